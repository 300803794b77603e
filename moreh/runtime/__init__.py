"""Carries out, on the workers that there are, what was decided for a model."""
