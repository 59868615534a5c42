"""Tests of one adapter for each row of a batch."""
