"""Evaluate a checkpoint or a Hugging Face folder: perplexity, passkey, needles, RULER.

launcher/evaluate.py --config C --lengths 4096,8192,131072 --tasks ppl,passkey,niah,ruler
launcher/evaluate.py --compare DIR DIR ... --output DIR

Writes RUN/eval/step-N/report.{json,md,html}, the plots, and TensorBoard scalars into the run.
"""

import argparse
from pathlib import Path

from tensorlm.config import load_config
from tensorlm.runtime.arguments import parse_lengths
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace a setting")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    which.add_argument("--hf", type=Path, metavar="DIR", help="a Hugging Face folder instead")
    which.add_argument(
        "--random-weights", action="store_true", help="no checkpoint: for time and memory only"
    )
    which.add_argument(
        "--compare", type=Path, nargs="+", metavar="DIR",
        help="join the reports found below these folders: lengths of one model into one report, "
        "several models side by side",
    )  # fmt: skip
    parser.add_argument("--lengths", help="eval.lengths, comma-separated")
    parser.add_argument("--tasks", help="eval.tasks, comma-separated: ppl,passkey,niah,ruler")
    parser.add_argument("--output", type=Path, help="folder for the report")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    if args.compare:
        return _compare(args.compare, args.output)
    if not args.config:
        raise UserError("--config: missing (the TOML file of the run)")
    overrides = list(args.overrides)
    if args.lengths:
        overrides.append(f"eval.lengths={parse_lengths(args.lengths)}")
    if args.tasks:
        names = ",".join(f'"{name}"' for name in args.tasks.split(","))
        overrides.append(f"eval.tasks=[{names}]")
    overrides.append("eval.every=0")  # else what only holds in the middle of training is checked
    config = load_config(args.config, overrides)

    from tensorlm.evaluation.launch import evaluate_on_ranks
    from tensorlm.runtime.launch_env import read_launch_env

    return evaluate_on_ranks(
        config, read_launch_env(), args.checkpoint, args.hf, args.random_weights, args.output
    )


def _compare(folders: list[Path], output: Path | None) -> int:
    if output is None:
        raise UserError("--output: missing (a folder for the joint report)")

    from tensorlm.evaluation.compare import compare_reports

    print(compare_reports(folders, output))
    print(f"report: {output / 'report.html'}")
    return 0


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main, leave_at_once=True)
