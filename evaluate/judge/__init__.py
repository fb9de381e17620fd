"""`judge`: the questions of `evaluate` for images that something else made.

Folders are read by `data_prep`, which is started as a command. The result is an ordinary run, so
that no question, check or table exists twice.
"""
