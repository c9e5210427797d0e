"""From a run's history to the page a person reads."""
