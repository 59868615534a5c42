"""Tests of adapted models under torch's own features."""
