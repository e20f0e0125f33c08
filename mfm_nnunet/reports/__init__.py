"""Pictures and texts for people: progress, overlays, the table of a plan."""
