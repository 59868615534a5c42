"""Tests of the digit study."""
