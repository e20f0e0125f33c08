"""Checkpoints of others read as ours, and ours written for others."""
