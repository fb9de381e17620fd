"""Networks that one stage trains and another samples from or evaluates with.

Imports no stage. Nothing here knows a run or trains a generator.
"""
