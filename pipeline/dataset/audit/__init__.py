"""Whether a dataset may be trained on: images that its splits share, labels that contradict.

Commands and tables lie in `data_prep.audit`.
"""
