"""Train a model: `deepspeed launcher/train.py --config configs/demo.toml [key.sub=value ...]`.

Run the same command again to continue from the newest intact checkpoint. The command works the same
under deepspeed, torchrun, srun, mpirun and plain python.
"""

from tensorlm.runtime.arguments import LOCAL_RANK, Option, Settings, parse
from tensorlm.runtime.errors import EXIT_DONE, EXIT_PREEMPTED
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.imports import without_collection
from tensorlm.runtime.preemption import StopRequest


def main(stop: StopRequest) -> int:
    options = {
        "--replay STEP": Option(
            "recompute this step from the checkpoint before it, compare it with the recorded loss, "
            "and write nothing"
        ),
        "--dry-run RANKS": Option(
            "check all settings, data and checkpoints for this number of ranks, and exit without "
            "training"
        ),
    }
    args = parse(__doc__, {**options, **LOCAL_RANK}, Settings())
    # Importing torch takes seconds, and signals must be handled before that.
    with without_collection():
        from tensorlm.config import load_config
        from tensorlm.runtime import launch_env

    ranks = launch_env.launched_world_size() if args.dry_run is None else args.dry_run
    config = load_config(args.config, args.overrides, ranks)
    if args.dry_run is not None:
        with without_collection():
            from tensorlm.train.dry_run import check_run

        print("\n".join(check_run(config, args.dry_run)))
        return 0
    launch = launch_env.read_launch_env()

    with without_collection():
        from tensorlm.train.loop import train
        from tensorlm.train.replay import replay

    if args.replay is not None:
        return replay(config, launch, args.replay)
    code = train(config, launch, stop)
    if code == EXIT_PREEMPTED and launch_env.restarts_failed_ranks():
        if launch.rank == 0:
            print("exit code 0 instead of 75: torchrun would restart the run otherwise", flush=True)
        return EXIT_DONE
    return code


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    stop = StopRequest().listen()
    # Launchers end all ranks when one has left: a request to stop may mean that another rank has
    # already reported the error.
    run_launcher(lambda: main(stop), leave_at_once=True, is_told=lambda: stop.is_asked)
