"""Limit of the audit."""

NEAR_LIMIT = 20_000
"""Largest dataset, in images, whose near-duplicates are searched unasked: about ten minutes on one
core. Larger ones are searched only with `verify --near`."""
