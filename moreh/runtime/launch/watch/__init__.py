"""Watching workers: their pulses, their stacks, their silence, and what the system says of their deaths."""
