"""y = x W'ᵀ + b without building W': the choice of path, and what computes it."""
