"""The recipes: whole jobs, each one command."""
