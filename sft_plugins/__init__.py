"""Drop-in components for open-source LLM trainers: exact masking, exact packing, collapse alarm."""
