"""The shared training loop on accelerate: tasks, random numbers, EMA, checkpoints, logs.

A stage defines what is trained, as a `Task`. Networks, losses and generators do not belong here.
"""
