"""Tests of one adapted tensor: its blocks, and tensors without data."""
