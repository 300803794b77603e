"""The parts of the check: each module has `run(case, settings)`, which returns a `Result` or raises `Skipped`."""
