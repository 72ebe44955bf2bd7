"""Calibration: text in, input statistics of every linear out, one decoder block in memory at a time."""
