"""Adapters on a live model: put on, read, saved, switched, merged, taken off."""
