"""Integers from samples: the model run layer by layer over a calibration set, and what the result costs."""
