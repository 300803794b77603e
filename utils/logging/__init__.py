"""Logs of a run: console, train.log, metrics.jsonl, trackers, loss curves."""
