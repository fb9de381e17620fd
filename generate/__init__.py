"""Trained generator + mask source -> synthetic mask-and-prompt dataset."""
