"""Tests of adapter files."""
