"""A row of data → a conversation, a pair of texts, or ids that somebody else made."""
