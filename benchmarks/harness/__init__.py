"""Code that the subcommands share: contestants, models, checks, timing, rows of results."""
