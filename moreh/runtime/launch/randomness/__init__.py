"""Random numbers that agree on all workers."""
