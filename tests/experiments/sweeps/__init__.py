"""Tests of sweeps over the digit study."""
