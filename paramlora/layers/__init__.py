"""The module that owns an adapted tensor: its forward, and its state before attaching."""
