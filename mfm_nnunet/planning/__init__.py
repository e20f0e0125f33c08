"""Planning: dataset fingerprint, planner, plans like a checkpoint, recipes."""
