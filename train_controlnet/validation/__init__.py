"""What is measured between steps: held-out loss, samples, mask adherence, and the verdict.

It leaves networks and random numbers as they were.
"""
