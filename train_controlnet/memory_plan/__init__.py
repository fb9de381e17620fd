"""`plan`: parameters, memory and disk of a training, from one step on the meta device.

Reads no weights, needs no GPU and no dataset, and changes nothing of a run.
"""
