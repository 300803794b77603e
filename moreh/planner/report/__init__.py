"""Reports of plans: tables, sentences, JSON and plots, for moreh-plan and --plan-only."""
