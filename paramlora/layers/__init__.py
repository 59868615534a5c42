"""The module that owns an adapted tensor: its forward, and what it was before."""
