"""Checkpoints of a run: saving, resuming, and stopping in time."""
