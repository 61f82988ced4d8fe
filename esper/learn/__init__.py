"""``esper learn``: a policy from recorded runs."""
