"""Tests of the analysis of classifiers."""
