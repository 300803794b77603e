"""What the planner decides: plans, tables of them, their pipeline schedules, and their notation."""
