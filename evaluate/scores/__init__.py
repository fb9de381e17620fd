"""The numbers behind the metrics: distances, precision and recall, neighbours, statistics.

Arrays in, numbers out. What is asked, and the verdict in words, belong to `evaluate.metrics`.
"""
