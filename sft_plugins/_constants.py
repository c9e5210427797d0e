"""Constants shared by every component; each stands once."""

IGNORE_INDEX = -100
"""Label that PyTorch's cross entropy skips."""
