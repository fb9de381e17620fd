"""Generators, one file each, found by file name; see `generate.generator` for what a file must provide."""
