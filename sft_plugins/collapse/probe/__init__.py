"""Asks the model: reads given answers, draws new ones, and measures both."""
