"""One file per architecture; the file's name is its name in the configuration (`baselines`).

Architectures never import each other. `train_baselines.architecture` describes the interface.
"""
