"""Is the whole conversation in what is trained? Shown by position, never by finding one text inside another."""
