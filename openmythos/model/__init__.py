"""The model: a plain single-device module, and the members of its seams."""
