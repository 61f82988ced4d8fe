"""What a person sees: the progress bar, the table at the end, and ``summary.json``."""
