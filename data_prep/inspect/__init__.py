"""The parts of `python -m data_prep inspect`: what lies in a raw folder, what an adapter makes of it, and what options fit it."""
