"""Which rows lie in which split: near-duplicates, groups, and splits that keep every group whole.

It sees rows and small descriptions of images, never a raw file.
"""
