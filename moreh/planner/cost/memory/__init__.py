"""The memory of a plan on each device: model states, activations, buffers, and the highest moment of a step."""
