"""Plans for people and programs: tables, sentences, JSON and pictures, for moreh-plan and the scripts' --plan-only."""
