"""Writers of tiny raw datasets, one a dataset that needs a raw folder: `tests/writers/NAME.py` with `write_raw(folder)`."""
