"""The fit of the planner to published runs, and its tests on them."""
