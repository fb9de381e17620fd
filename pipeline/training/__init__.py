"""The shared training loop on accelerate: tasks, random numbers, EMA, checkpoints, logs.

What is trained is a `Task` of a stage; no network, loss or generator is known here.
"""
