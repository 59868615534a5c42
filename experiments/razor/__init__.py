"""RL's Razor on ParityMNIST: forgetting against the divergence from the base."""
