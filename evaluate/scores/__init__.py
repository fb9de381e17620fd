"""What the field calls metrics: distances, precision and recall, nearest neighbours, statistics.

Arrays in, numbers out. The questions that they answer, and the verdicts in words, are the files of
`evaluate.metrics`.
"""
