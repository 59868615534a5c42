"""Tests of the kinds of adapters."""
