"""Tests of figures and of the report page."""
