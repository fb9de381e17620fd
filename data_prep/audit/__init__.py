"""`maskloom verify`: audit of prepared datasets, with tables and a contact sheet.

It only reads datasets. The checks that every stage runs first are in `pipeline.dataset`.
"""
