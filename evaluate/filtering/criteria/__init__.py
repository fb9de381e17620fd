"""One file per criterion: by what a synthetic image is kept or rejected.

Files are found by their names and never import each other. A criterion file holds
`class Options(Section)`, `VERSION: int` (raised when its scores change) and
`class Criterion(filtering.criterion.Criterion)`. It imports no torch at import time.
"""

DEFAULTS = ("mask_match", "realism", "class_agreement", "copies")
"""Criteria that are used if the configuration names none, in this order."""
