"""One file a dataset: each module defines `Adapter`, a subclass of `data_prep.adapter.DatasetAdapter`."""
