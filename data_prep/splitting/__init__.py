"""Assigns rows to splits: near-duplicates, groups, and splits that keep every group together.

The modules work on rows and image signatures, never on raw files.
"""
