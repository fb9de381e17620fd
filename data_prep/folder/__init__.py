"""The dataset `folder`: its options, and the listing of images and masks that they name.

The adapter is `data_prep.datasets.folder`; `inspect` proposes such options.
"""
