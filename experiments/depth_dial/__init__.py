"""The depth dial: what happens beyond the trained walks and the trained loops; see README.md."""
