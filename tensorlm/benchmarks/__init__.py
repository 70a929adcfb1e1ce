"""Measurements on real hardware, behind `launcher/benchmark.py`."""
