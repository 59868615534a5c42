"""Tests of the functions that a user calls on a model."""
