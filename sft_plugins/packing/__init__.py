"""Packing in which no document sees another."""
