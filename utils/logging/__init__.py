"""The reports of a run: lines on the console and in train.log, metrics.jsonl, TensorBoard, the loss curves."""
