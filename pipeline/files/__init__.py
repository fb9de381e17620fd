"""Files and folders: atomic writing, typed reading, ownership (what may be deleted), text formats.

Code that depends on what a dataset, a run or a stage is does not belong here.
"""
