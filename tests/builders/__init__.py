"""The only home of tiny plans, datasets, networks, scans and runs that tests build."""
