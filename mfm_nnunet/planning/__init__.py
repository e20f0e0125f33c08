"""WHAT was decided: the plan block, the dataset fingerprint and the planner."""
