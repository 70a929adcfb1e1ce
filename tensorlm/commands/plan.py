"""Predict the memory and time of a run: `python launcher/plan.py --config C --gpus 8 --gpu h100`.

The prediction needs no GPU and builds no model. docs/planning.md explains the formulas and how they
compare with measurements.
"""

from tensorlm.config import load_config
from tensorlm.plan.gpus import find_gpu
from tensorlm.plan.planning import make_plan
from tensorlm.plan.proposals import propose
from tensorlm.plan.report import format_plan, plan_json
from tensorlm.runtime.arguments import JSON, Option, Settings, parse, write_json
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher


def main() -> int:
    options = {
        "--gpus N": Option("number of GPUs, one rank each", required=True),
        "--gpu GPU": Option("kind of GPU: a100, h100, h200, b200, or its memory in GiB", "h100"),
    }
    args = parse(__doc__, {**options, **JSON}, Settings())
    config, gpu = load_config(args.config, args.overrides), find_gpu(args.gpu)
    if args.gpus < 1:
        raise UserError(f"--gpus: must be at least 1, got {args.gpus}")
    plan = make_plan(config, args.gpus, gpu)
    proposals = propose(plan)
    print(format_plan(plan, proposals, args.config))
    write_json(args.json, plan_json(plan, proposals))
    return 0


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main)
