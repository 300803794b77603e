"""Tests of what the training scripts train, and with which optimizer."""
