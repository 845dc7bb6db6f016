"""Tables of architectures, and how one is resolved against a live model."""
