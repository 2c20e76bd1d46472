"""A pretrained stack of layers becomes a looped model, before any training."""
