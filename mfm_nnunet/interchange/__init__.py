"""Conversion between our checkpoints and those of other programs."""
