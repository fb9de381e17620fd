"""What is done to a decoded image or mask: intensity, stains, size, tiles, label maps.

Functions from arrays to arrays; no file of a dataset is opened here.
"""
