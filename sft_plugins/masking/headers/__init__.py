"""Headers of turns in ids: where an assistant begins to speak, and which of them the model writes itself."""
