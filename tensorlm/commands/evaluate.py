"""Evaluate a checkpoint or a Hugging Face folder: perplexity, recall, passkey, needles, RULER.

Evaluate:
  python launcher/evaluate.py --config C --lengths 4096,131072 --tasks ppl,recall,passkey,niah,ruler
Join the reports of several evaluations:
  python launcher/evaluate.py --compare DIR DIR ... --output DIR

An evaluation writes report.json, report.md, report.html and the plots into RUN/eval/step-N, and
scalars into the run's TensorBoard.
"""

from pathlib import Path

from tensorlm.config import load_config
from tensorlm.runtime.arguments import LOCAL_RANK, Option, Settings, parse, parse_lengths
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.imports import without_collection

MODELS = {
    "--checkpoint STEP": Option("step of the checkpoint to evaluate (default: the newest)"),
    "--hf DIR": Option("evaluate this Hugging Face folder instead of a checkpoint"),
    "--random-weights": Option(
        "evaluate without a checkpoint, to measure only time and memory", default=False
    ),
    "--compare DIR": Option(
        "join the reports below these folders instead of evaluating: lengths of one model become "
        "one report, several models appear side by side",
        nargs="+",
    ),
}
OPTIONS = {
    "--lengths LIST": Option(
        "context lengths in tokens, separated by commas (default: eval.lengths, or else "
        "data.seq_len)"
    ),
    "--tasks LIST": Option(
        "what to measure, separated by commas: ppl (perplexity), recall (of the choice of routed "
        "layers), passkey, niah (needles), ruler (default: eval.tasks)"
    ),
    "--output DIR": Option(
        "folder for the report (default: below RUN/eval; required with --compare)"
    ),
}


def main() -> int:
    settings = Settings("TOML file of the run (required, except with --compare)", required=False)
    args = parse(__doc__, {**OPTIONS, **LOCAL_RANK}, settings, MODELS)
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
    overrides.append("eval.every=0")  # skip checks that only concern evaluation during training
    config = load_config(args.config, overrides)

    with without_collection():
        from tensorlm.evaluation.launch import evaluate_on_ranks
        from tensorlm.runtime.launch_env import read_launch_env

    return evaluate_on_ranks(
        config, read_launch_env(), args.checkpoint, args.hf, args.random_weights, args.output
    )


def _compare(folders: list[Path], output: Path | None) -> int:
    if output is None:
        raise UserError("--output: missing (a folder for the joint report)")

    with without_collection():
        from tensorlm.evaluation.compare import compare_reports

    print(compare_reports(folders, output))
    print(f"report: {output / 'report.html'}")
    return 0


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main, leave_at_once=True)
