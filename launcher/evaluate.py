"""Evaluate a checkpoint: `launcher/evaluate.py --config C --lengths 4096,8192,16384`.

On several ranks (deepspeed, torchrun, srun) `parallel.sp` of them share each window.
Writes RUN/eval/step-N/{report.json, perplexity.png} and TensorBoard scalars into the run.
"""

import argparse
from pathlib import Path

from tensorlm.config import load_config, parse_config
from tensorlm.errors import UserError, run_launcher
from tensorlm.launch_env import read_launch_env


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace a setting")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    parser.add_argument("--lengths", required=True, help="comma-separated context lengths")
    parser.add_argument("--max-tokens", type=int, default=1 << 20, help="held-out tokens to use")
    parser.add_argument("--output", type=Path, help="folder for the report")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    try:
        lengths = [int(part) for part in args.lengths.split(",")]
    except ValueError:
        raise UserError(f"--lengths: {args.lengths} is not a list like 4096,8192") from None
    if min(lengths) < 2:
        raise UserError(f"--lengths: {min(lengths)} is too short")

    launch = read_launch_env()
    config.check_evaluation(launch.world_size, lengths)

    import torch

    from fold_parallel import create_grid
    from tensorlm.checkpoint import load_weights, select_checkpoint
    from tensorlm.engine import init_distributed, leave_distributed
    from tensorlm.evaluation.perplexity import evaluate_perplexity
    from tensorlm.evaluation.report import format_table, log_to_tensorboard, write_report
    from tensorlm.model import Llama

    device = init_distributed(launch)
    run_dir = Path(config.run.dir)
    checkpoint = select_checkpoint(run_dir, args.checkpoint, launch.rank, launch.world_size)
    trained = parse_config(checkpoint.manifest["config"], str(checkpoint.folder))
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    grid = create_grid(config.parallel.sp)
    with device:
        model = Llama(trained.model, grid, loss_chunk=config.train.loss_chunk)
    load_weights(checkpoint, model)
    model.to(dtype).eval()

    data = Path(config.data.path)
    results = evaluate_perplexity(model, data, lengths, device, args.max_tokens)
    if launch.rank == 0:
        output = args.output or run_dir / "eval" / checkpoint.folder.name
        facts = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "data": str(data)}
        write_report(output, results, facts, trained.data.seq_len)
        log_to_tensorboard(run_dir, checkpoint.step, results)
        print(format_table(results, trained.data.seq_len))
        print(f"report: {output / 'report.json'}  plot: {output / 'perplexity.png'}")
    leave_distributed()
    return 0


if __name__ == "__main__":
    run_launcher(main, leave_at_once=True)
