"""Decides from numbers alone; knows no model and no trainer."""
