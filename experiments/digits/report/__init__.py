"""The tables, figures and report of the digit study, from a run's rows."""
