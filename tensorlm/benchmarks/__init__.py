"""Measurements on this machine's hardware, run by `launcher/benchmark.py`."""
