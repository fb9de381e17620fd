"""One file per dataset, found by its name; see `data_prep.adapter` for what a file must provide.

A dataset never imports another one; what two need lives in `readers` or `processing`.
"""
