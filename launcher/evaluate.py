"""Evaluate a checkpoint or a Hugging Face folder: `python launcher/evaluate.py --config C`."""

from tensorlm.commands.evaluate import run

if __name__ == "__main__":
    run()
