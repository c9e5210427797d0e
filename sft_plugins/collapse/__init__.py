"""Entropy and mode collapse, watched against the model training started from."""
