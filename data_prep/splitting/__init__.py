"""Assigns rows to splits: groups of duplicates, and splits that keep every group together.

The modules work on rows, never on raw files. Near-duplicates come from
`pipeline.dataset.near_duplicates`.
"""
