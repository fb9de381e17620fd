"""The parts of `combine`: synthetic sets, the choice of their rows, the place of output, the card.

They know nothing of the order in which `pipeline.dataset.combine` uses them.
"""
