"""Tests of paramlora.integrations, each against the library that it serves."""
