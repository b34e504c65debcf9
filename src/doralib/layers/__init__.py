"""Adapted layers, one kind a file."""
