"""WHY it learns: one file per pretext task; the file name is the registry."""
