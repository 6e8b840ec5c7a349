"""Slow checks and speed measurements; see results/."""
