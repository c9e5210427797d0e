"""A model's twin: the same architecture with a few thousand weights."""
