"""Networks that one stage trains and another one samples from or measures with.

Imports no stage. Nothing here knows a run or trains a generator.
"""
