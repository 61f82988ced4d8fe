"""Grown models for other programs: saved and loaded again, and traced as programs."""
