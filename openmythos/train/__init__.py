"""Training on one device: depth schedules, objectives, optimisers and the training loop."""
