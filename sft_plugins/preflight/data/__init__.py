"""Rows as they lie on disk, read as a stream."""
