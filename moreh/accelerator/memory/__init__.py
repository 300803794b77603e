"""The memory of a job's tensors on the simulated device, and the error if they do not fit."""
