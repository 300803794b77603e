"""How the planner is fitted to published runs, and how it is tested on them."""
