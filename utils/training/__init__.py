"""Parts of a training loop: model, optimizer, evaluation, checkpoints, learning rate, metrics."""
