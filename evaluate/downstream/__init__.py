"""Downstream models trained on real images, synthetic ones or both, and their comparison.

The segmentation network is `models.segmenter`; the metrics that use it are in `evaluate.metrics`.
"""
