"""What is learned at a tensor: one class a kind, on tensors only."""
