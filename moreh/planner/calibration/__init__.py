"""Predictions with an interval, which a few measured steps of the same program narrow."""
