"""Predictions of a run's memory and time from formulas, without building anything."""
