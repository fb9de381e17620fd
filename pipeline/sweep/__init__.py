"""`sweep`: several generators or variants of a configuration, and one table of their results.

Each of them is an ordinary run; nothing is trained or measured here.
"""
