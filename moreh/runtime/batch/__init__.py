"""Batches: reads the arguments of a call, cuts them into micro-batches without padding, and returns a loss."""
