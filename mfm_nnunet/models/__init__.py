"""THE network, as pretext tasks see it."""
