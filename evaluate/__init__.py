"""`evaluate`: does the synthetic data help, is it faithful to its masks, and does it repeat its training images?"""
