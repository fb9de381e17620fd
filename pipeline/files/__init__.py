"""Files and folders: atomic writing, typed reading, ownership (what may be deleted), text formats.

Nothing here knows what a dataset, a run or a stage is.
"""
