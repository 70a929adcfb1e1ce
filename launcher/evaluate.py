"""Evaluate a checkpoint or a Hugging Face folder: `python launcher/evaluate.py --config C`."""

from tensorlm.runtime.imports import without_collection

with without_collection():
    from tensorlm.commands.evaluate import run

if __name__ == "__main__":
    run()
