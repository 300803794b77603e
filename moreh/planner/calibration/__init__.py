"""Prediction intervals, and their calibration with measured steps."""
