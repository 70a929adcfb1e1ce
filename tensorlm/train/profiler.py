"""Traces of optimizer steps, for https://ui.perfetto.dev or chrome://tracing."""

from pathlib import Path

from torch.profiler import profile, schedule, tensorboard_trace_handler


def start_profiler(run_dir: Path, steps: tuple[int, int], done: int) -> profile | None:
    """Trace optimizer steps start ... stop - 1 (from 1) into `run_dir/profile/`.

    Call `step()` on the result after each optimizer step.

    Args:
        run_dir: folder of the run.
        steps: (start, stop).
        done: number of completed steps.

    Returns:
        The profiler, or None if no step is left to trace.
    """
    start, stop = max(steps[0], done + 1), steps[1]
    if start >= stop:
        return None
    ahead = start - done - 1
    profiler = profile(
        schedule=schedule(
            wait=max(0, ahead - 1), warmup=min(1, ahead), active=stop - start, repeat=1
        ),
        on_trace_ready=tensorboard_trace_handler(str(run_dir / "profile")),
    )
    profiler.start()
    return profiler
