"""Analysis of any classifier: evaluation, confusion counts, adapter effects, update geometry."""
