"""One file per architecture; the file's name is its name in the configuration (`baselines`).

One never imports another; see `train_baselines.family` for what a file must provide.
"""
