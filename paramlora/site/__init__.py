"""Adapted tensors in a model: where they are, what they are called, and which are tied."""
