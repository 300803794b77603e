"""The search for the best plan: requests, constraints, candidates, and suggestions if no plan fits."""
