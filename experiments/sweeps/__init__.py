"""Grids of settings over the digit study, the selection of remedies, and their reports."""
