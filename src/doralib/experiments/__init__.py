"""What compares, measures and explains adapters."""
