"""Tests that run or check the documentation and the notebooks."""
