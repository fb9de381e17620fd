"""One file per feature extractor, found by its name.

An extractor file holds `INPUT_SIZE: int` (the side, in pixels, that its network was trained at)
and `def load(side: int, device: str) -> Extractor`.
"""
