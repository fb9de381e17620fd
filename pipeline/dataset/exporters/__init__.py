"""Layouts that a dataset can be exported to, one file each; found by file name."""
