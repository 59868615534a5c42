"""Tests of the layers that own an adapted tensor."""
