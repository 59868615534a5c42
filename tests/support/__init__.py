"""Code that tests share: models, reference computations and assertions."""
