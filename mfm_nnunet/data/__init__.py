"""FROM files TO crops."""
