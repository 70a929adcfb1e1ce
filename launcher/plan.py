"""Predict memory and time: `python launcher/plan.py --config C --gpus 8 --gpu h100`."""

from tensorlm.runtime.imports import without_collection

with without_collection():
    from tensorlm.commands.plan import run

if __name__ == "__main__":
    run()
