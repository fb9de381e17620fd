"""One file per generator, found by its name; `generate.generator` describes the interface.

Generators never import each other; networks live in `models`.
"""

DEFAULTS = ("controlnet", "text_only")
"""The generators of a configuration that names none."""
