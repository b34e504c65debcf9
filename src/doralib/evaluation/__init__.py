"""Scores of a model on tasks, and the texts that it writes."""
