"""The stack at a tensor: its adapters' factors, which of them are active, merged or in a block."""
