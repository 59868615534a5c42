"""Tests of the code that every study uses."""
