"""Text: looped models against plain stacks, and what the number of loops does to the loss."""
