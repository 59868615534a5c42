"""Complete scripts to copy from."""
