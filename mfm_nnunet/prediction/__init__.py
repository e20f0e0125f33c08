"""Prediction: from a folder of scans to masks."""
