"""Tests of sequences of tasks."""
