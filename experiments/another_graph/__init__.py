"""A model of walks fine-tuned on another graph: what is left of the dial; see README.md."""
