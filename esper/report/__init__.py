"""The report of a run: the table at the end, and ``summary.json``."""
