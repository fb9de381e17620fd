"""One file per generator, found by its name; see `generate.generator` for what a file must provide.

A generator never imports another one; networks live in `models`.
"""
