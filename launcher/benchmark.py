"""Measure speed and memory: `python launcher/benchmark.py attention --lengths 32768,131072`."""

from tensorlm.runtime.imports import without_collection

with without_collection():
    from tensorlm.commands.benchmark import run

if __name__ == "__main__":
    run()
