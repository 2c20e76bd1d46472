"""One folder per claim: the question, one script, the expected and the measured numbers."""
