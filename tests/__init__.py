"""Tests: each folder of the package and of the experiments has a folder of that name here."""
