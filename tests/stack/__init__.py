"""Tests of the stack at a tensor: blocks of a tensor, and blocks of threads and tasks."""
