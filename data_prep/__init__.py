"""Raw labelled images -> mask-and-prompt dataset: the stage `prepare`; `inspect` and `verify`.

Imports no torch when it is imported, and no other stage; a raw file is only ever read.
"""
