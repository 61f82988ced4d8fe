"""Checkpoints: everything a run needs to go on with the same bits. See ``docs/checkpoints.md``."""
