"""`sft-plugins demo`: the whole of it, from packages to a reloaded adapter."""
