"""`python -m data_prep verify`: an audit of prepared datasets, its tables and its contact sheet.

It reads datasets and changes none. What every stage asks first lies in `pipeline.dataset`.
"""
