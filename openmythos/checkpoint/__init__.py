"""A model on disk: saved, loaded, and its weights one at a time."""
