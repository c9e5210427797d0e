"""Conversation → text, as the chat template of the tokenizer writes it; what one rendering proves of others."""
