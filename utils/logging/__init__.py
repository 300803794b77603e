"""What a run reports: lines on the console and in train.log, metrics.jsonl, TensorBoard, the loss curves."""
