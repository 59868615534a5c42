"""Tests of the text study."""
