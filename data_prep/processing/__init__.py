"""Processing of decoded images and masks: stains, resizing, tiles, label maps.

The functions map arrays to arrays and open no dataset files.
"""
