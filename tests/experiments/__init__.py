"""Tests of the experiments, a folder for each of theirs."""
