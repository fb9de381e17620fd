"""One file per layout to export to, found by its name; see `pipeline.dataset.exporter`.

An exporter never imports another one.
"""
