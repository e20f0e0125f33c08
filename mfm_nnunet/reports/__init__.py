"""Reports: console progress, logs, plots and overlay pictures."""
