"""The demo: a looped model on real text, then one on a puzzle of known difficulty."""
