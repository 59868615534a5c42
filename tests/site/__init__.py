"""Tests of adapted tensors in a model: files of blocks, and tensors without data."""
