"""Decoders of the formats that datasets come in: images, DICOM, NIfTI, slides, tables.

`image_files` and `decoding` read common image formats, `common` holds what readers share,
`file_names` and `file_patterns` find files, `intensity` maps raw values to 0..255; each other file
reads one format. Nothing here knows a dataset by name, or writes.
"""
