"""Decoders of the formats that datasets come in: images, DICOM, NIfTI, slides, tables.

One file per format. Nothing here knows a dataset by name, or writes.
"""
