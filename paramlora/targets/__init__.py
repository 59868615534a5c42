"""What a target matches, and hints if it matches nothing."""
