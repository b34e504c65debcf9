"""The `doralib` command: one file a verb."""
