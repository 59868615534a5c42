"""Code that all studies share: settings, run folder, stages, training loop, loggers, grids."""
