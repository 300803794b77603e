"""Modules that scripts of the platform import by these names."""
