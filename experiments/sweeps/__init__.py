"""Grids of settings over the digit study, and their reports."""
