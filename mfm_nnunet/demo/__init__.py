"""The demo: all four steps on real scans in one command."""
