"""Halting: what sets the number of loops, and whether it follows the difficulty."""
