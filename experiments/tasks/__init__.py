"""Sequences of tasks on digit images, an adapter a stage."""
