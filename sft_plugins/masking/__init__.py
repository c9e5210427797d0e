"""Loss on exactly the response tokens."""
