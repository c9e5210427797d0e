"""How long a test waits for another process, of which it knows that it ends."""

HANGS = 1200.0
"""Seconds after which a process is taken to hang: ten times what the longest takes on a machine that does nothing else."""
