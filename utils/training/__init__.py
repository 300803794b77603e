"""The parts that a training loop uses: the model, evaluation, checkpoints, the learning rate, metrics."""
