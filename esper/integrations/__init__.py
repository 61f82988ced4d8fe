"""Callbacks for other people's training loops; each needs its own package (extras ``lightning``, ``transformers``)."""
