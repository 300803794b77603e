"""The search for the best plan: requests, constraints, candidates, and what helps where no plan is found."""
