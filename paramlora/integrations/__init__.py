"""Thin files over other libraries, each imported on request alone."""
