"""Sequences of tasks on digit images, with one adapter per stage."""
