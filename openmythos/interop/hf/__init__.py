"""Source files that an export carries along; transformers runs them, this package never does."""
