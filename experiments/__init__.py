"""Studies made with paramlora, run from a checkout: `python -m experiments --help`."""
