"""MaskLoom: labelled medical images in, a synthetic dataset and a verdict on it out.

The packages are the checkout's top-level folders; the links beside this file give them their import names, `maskloom.pipeline`, `maskloom.data_prep`, ….
"""
