"""Models on disk: matched with adapters, merged tensor by tensor, verified, converted, loaded."""
