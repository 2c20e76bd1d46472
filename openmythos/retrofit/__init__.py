"""Convert a pretrained stack of layers into a looped model, without training."""
