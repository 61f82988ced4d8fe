"""Checkpoints: everything a run needs to continue with the same bits. See ``docs/checkpoints.md``."""
