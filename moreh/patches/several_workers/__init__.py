"""Patches of what a script calls, for several workers."""
