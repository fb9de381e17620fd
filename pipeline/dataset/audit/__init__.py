"""Checks that decide whether a dataset may be used: shared images and contradicting labels.

Commands, tables and the search for near-duplicates are in `data_prep.audit`.
"""
