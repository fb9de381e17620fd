"""One file per feature extractor, found by its name.

An extractor file defines `INPUT_SIZE: int` (the side in pixels at which its network was trained),
`def check(side: int) -> None` and `def load(side: int, device: str) -> Extractor`.
"""
