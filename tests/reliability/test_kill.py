"""kill -9 at random instants of any rank: the run that goes on is the run that was not killed."""

import pytest

from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import kill_sweep


@pytest.mark.parametrize(("world", "background"), [(1, "true"), (2, "false")])
def test_killed_at_random_instants_ends_like_the_undisturbed_run(
    tiny: TinyRuns, world: int, background: str
) -> None:
    config = tiny("run", f"checkpoint.background={background}")
    assert kill_sweep(config, world, num_kills=12, seed=0) >= 1


# 10,000 kills of one process and 1,000 of two, a hundred and fifty at a time.
@pytest.mark.faults
@pytest.mark.parametrize("seed", range(100))
def test_one_process_killed_a_hundred_times(tiny: TinyRuns, seed: int) -> None:
    config = tiny("run", f"checkpoint.background={'true' if seed % 2 else 'false'}")
    kill_sweep(config, 1, num_kills=100, seed=seed)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_two_ranks_killed_fifty_times(tiny: TinyRuns, seed: int) -> None:
    stage = seed % 4
    config = tiny(
        "run", f"zero.stage={stage}", f"checkpoint.background={'true' if seed % 2 else 'false'}"
    )
    kill_sweep(config, 2, num_kills=50, seed=seed)
