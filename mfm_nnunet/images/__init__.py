"""THE GATE: from a file to a complete, finite volume of known geometry, or a refusal by name."""
