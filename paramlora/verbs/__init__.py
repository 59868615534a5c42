"""What a user calls on a model."""
