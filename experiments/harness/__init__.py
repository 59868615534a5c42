"""What every study needs: settings, run folder, stages, training loop, loggers, grids."""
