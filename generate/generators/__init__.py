"""One file per generator, found by its name; `generate.generator` describes the interface.

Generators never import each other; networks live in `models`.
"""

DEFAULTS = ("controlnet", "text_only")
"""Generators that are used if the configuration names none."""
