"""Train a model: `deepspeed launcher/train.py --config configs/demo.toml [key.sub=value ...]`.

Works the same under deepspeed, torchrun, srun, mpirun and plain python.
"""

import argparse

from tensorlm.config import load_config
from tensorlm.errors import run_launcher
from tensorlm.launch_env import read_launch_env
from tensorlm.preemption import StopRequest


def main() -> int:
    stop = StopRequest().listen()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="TOML file of the run")
    parser.add_argument("--replay", type=int, metavar="STEP", help="compute one step again")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace a setting")
    parser.add_argument(
        "--dry-run", type=int, metavar="RANKS", help="check all settings for so many ranks, and end"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    config = load_config(args.config, args.overrides)
    # What imports torch is imported after the configuration is known to be good.
    if args.dry_run is not None:
        from tensorlm.dry_run import check_run

        print("\n".join(check_run(config, args.dry_run)))
        return 0
    launch = read_launch_env()

    from tensorlm.replay import replay
    from tensorlm.train import train

    if args.replay is not None:
        return replay(config, launch, args.replay)
    return train(config, launch, stop)


if __name__ == "__main__":
    run_launcher(main, leave_at_once=True)
