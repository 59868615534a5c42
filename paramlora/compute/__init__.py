"""y = x W'ᵀ + b without building W': the choice of a path, and the code of each path."""
