"""Export formats, one file per format, found by file name; see `pipeline.dataset.exporter`.

An exporter must not import another one.
"""
