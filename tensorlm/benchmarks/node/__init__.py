"""The whole system on all GPUs of one host: `python launcher/benchmark.py node`."""
