"""Tests of the computation of a layer's output: paths, the native extension, memory."""
