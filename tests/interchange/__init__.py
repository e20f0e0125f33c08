"""Checkpoints of others in, ours out."""
