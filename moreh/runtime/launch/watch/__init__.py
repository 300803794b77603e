"""Monitoring of workers: heartbeats, stacks, hangs, and causes of death."""
