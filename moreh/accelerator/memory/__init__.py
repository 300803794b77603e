"""What a job's tensors take on the simulated device, and the error when they do not fit."""
