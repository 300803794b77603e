"""Checkpoints of a run: when they are written, what they say about the run, and how it goes on from one."""
