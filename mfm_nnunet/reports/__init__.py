"""What people look at: progress, overlays, the table of a plan."""
