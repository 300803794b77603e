"""What a training loop takes from elsewhere: the model, evaluation, checkpoints, the learning rate, metrics."""
