"""``esper watch``: a run or a sweep while it is under way, in the terminal or in a browser."""
