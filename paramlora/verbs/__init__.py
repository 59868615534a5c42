"""The functions that users call on a model."""
