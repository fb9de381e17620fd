"""Layers that several networks of `models` share."""
