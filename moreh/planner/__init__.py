"""The planner: from a model and an accelerator to the best parallel plan. It needs no process group, weights or GPU."""
