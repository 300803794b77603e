"""The cost of a plan: time of layers, stages and pipelines, memory of each device, and predictions from both."""
