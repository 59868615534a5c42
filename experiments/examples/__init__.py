"""Complete scripts to copy and adapt."""
