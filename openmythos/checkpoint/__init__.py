"""Checkpoints: saving and loading a model, and reading weights one at a time."""
