"""A conversation → the texts of its supervised turns → ids → labels."""
