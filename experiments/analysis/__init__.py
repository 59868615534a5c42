"""What any classifier's answers tell: evaluation, confusion counts, insight, geometry, metrics."""
