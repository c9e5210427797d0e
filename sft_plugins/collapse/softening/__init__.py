"""WiSE-FT for a finished run: between the base and what training made of it, the place that keeps both."""
