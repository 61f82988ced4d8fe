"""``esper auto``: a model of a size found by itself, within a budget."""
