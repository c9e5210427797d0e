"""Drop-in components for open-source LLM trainers: exact masking, exact packing, collapse alarm."""

__version__ = "0.1.0"
