"""Loops against a written chain of thought, at equal FLOPs."""
