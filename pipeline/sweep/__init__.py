"""`sweep`: several generators or variants of a configuration, and one table of their results.

Each variant is an ordinary run. Training and metrics do not belong here.
"""
