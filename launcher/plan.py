"""Predict memory and time: `python launcher/plan.py --config C --gpus 8 --gpu h100`."""

from tensorlm.commands.plan import run

if __name__ == "__main__":
    run()
