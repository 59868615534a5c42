"""Matching of targets to tensors, and hints for targets without a match."""
