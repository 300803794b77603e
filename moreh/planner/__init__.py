"""The planner: from a model and an accelerator to the best parallel plan. It needs no process group, weights or GPU.

Its packages, each of which imports only those below it:

- report: tables, explanations, JSON and pictures of plans
- search: requests, constraints, candidates, and the search for the best plan
- cost: seconds and bytes of plans, and predictions
- hardware: clusters and links, the time model of a device, this machine measured
- plan: plans, their schedules and their notation; beside it software_profile.py and units.py
"""
