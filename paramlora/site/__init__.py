"""One adapted tensor: its stack, its factors, and where to find it in a model."""
