"""A configured run from its first line to its summary: builds the parts, connects them, and leaves nothing open."""
