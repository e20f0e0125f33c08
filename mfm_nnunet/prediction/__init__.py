"""FROM a folder TO masks."""
