"""One folder a claim: the question, one script, what was expected, what came out."""
