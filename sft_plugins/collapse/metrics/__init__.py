"""Arrays in, numbers out: no model, no trainer, no decision."""
