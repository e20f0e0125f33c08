"""HOW it is optimised."""
