"""MaskLoom: labelled medical images in, a synthetic dataset and a verdict on it out.

The subpackages `maskloom.pipeline`, `maskloom.data_prep`, … are the top-level folders of the
checkout, which are linked here. Only the command line `maskloom` itself lives in this folder.
"""
