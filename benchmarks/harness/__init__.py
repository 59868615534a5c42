"""What the subcommands share: contestants, models, timing, rows of results."""
