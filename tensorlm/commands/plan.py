"""Predict the memory and time of a run: `python launcher/plan.py --config C --gpus 8 --gpu h100`.

The prediction needs no GPU and builds no model. docs/planning.md explains the formulas and how they
compare with measurements.
"""

import argparse
from pathlib import Path

from tensorlm.config import load_config
from tensorlm.plan.gpus import find_gpu
from tensorlm.plan.planning import make_plan
from tensorlm.plan.proposals import propose
from tensorlm.plan.report import format_plan, plan_json
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.strict_json import json_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="TOML file of the run")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, one rank each")
    parser.add_argument(
        "--gpu",
        default="h100",
        help="kind of GPU: a100, h100, h200, b200, or its memory in GiB (default: h100)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every number to this file"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings that replace those of the file, such as train.steps=100",
    )
    args = parser.parse_intermixed_args()  # settings may appear anywhere
    config, gpu = load_config(args.config, args.overrides), find_gpu(args.gpu)
    if args.gpus < 1:
        raise UserError(f"--gpus: must be at least 1, got {args.gpus}")
    plan = make_plan(config, args.gpus, gpu)
    proposals = propose(plan)
    print(format_plan(plan, proposals, args.config))
    if args.json:
        args.json.write_text(json_text(plan_json(plan, proposals), indent=1) + "\n")
    return 0


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main)
