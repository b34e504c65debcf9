"""The frozen layers under adapted ones."""
