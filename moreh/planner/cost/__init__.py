"""What a plan costs: seconds of layers, stages and pipelines, bytes on every device, and predictions from both."""
