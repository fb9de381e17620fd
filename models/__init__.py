"""Networks that one stage trains and another samples from or evaluates with.

Imports no stage. Nothing here knows a run or trains a generator; `segmenter` holds the training,
predictions and scores of the segmentation model as well, because several stages measure with it.
"""
