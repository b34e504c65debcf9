"""The adapted linear operator and its norm."""
