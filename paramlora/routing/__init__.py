"""One adapter for each row of a batch: how layers compute inside `routed`."""
