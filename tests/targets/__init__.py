"""Tests of what targets match."""
