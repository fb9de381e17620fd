"""`plan`: parameters, memory and disk space of a training, from one step on the meta device.

Reads no weights, needs no GPU or dataset, and changes nothing in a run.
"""
