"""Tests of published methods on top of the verbs."""
