"""Search for near-duplicate images: copies with calipers, other contrast, or a crop.

`search.py` describes the steps. Preparation groups near-duplicates before splitting; evaluation
compares synthetic with held-out images. The modules work on image signatures, never on datasets.
"""
