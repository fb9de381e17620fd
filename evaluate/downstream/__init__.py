"""Downstream models trained on real images, synthetic ones or both, and their comparison.

Segmentation models are trained by `models.segmenter`; the metrics are in `evaluate.metrics`.
"""
