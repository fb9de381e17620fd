"""The scores behind the metrics: distances, precision and recall, nearest neighbours, statistics.

Arrays in, numbers out. The question and the verdict in words belong to `evaluate.metrics`.
"""
