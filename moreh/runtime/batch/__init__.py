"""The batch: a script's call is read, cut into micro-batches without padding, and answered with a loss."""
