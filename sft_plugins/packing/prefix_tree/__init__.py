"""Rows that begin alike, folded into trees: what they share is kept once, and each branch sees the path to its fork."""
