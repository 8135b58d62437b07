"""The training loop and what it keeps: optimizers, learning rate, checkpoints, metrics, progress, signals."""
