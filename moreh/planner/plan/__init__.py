"""Plans, tables of plans, pipeline schedules, and the notation of plans."""
