"""The commands: one module per command; heavy imports stand inside the functions."""
