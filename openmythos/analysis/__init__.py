"""What loops do to the state: traces and their pictures."""
