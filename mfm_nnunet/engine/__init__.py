"""Optimisation: the training loop, its state on disk, and the probe."""
