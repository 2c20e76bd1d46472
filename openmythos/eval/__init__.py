"""Scores of a model: held-out loss and tasks, by number of loops."""
