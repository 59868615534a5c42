"""Tests of the examples to copy."""
