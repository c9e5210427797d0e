"""Command line of sft-plugins."""
