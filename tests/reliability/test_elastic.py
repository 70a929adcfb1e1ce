"""A checkpoint of any number of ranks, ZeRO stage and sharding continues on any other."""

import hashlib
import itertools
from pathlib import Path

import pytest

from tensorlm.checkpoint import STATE, Checkpoint, Saver, newest_checkpoint
from tensorlm.config import Config
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest
from tensorlm.train.loop import describe_state, start
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job, final_state
from tests.support.launching import losses

Topology = tuple[int, int, int]  # ranks, ZeRO stage, sp
TOPOLOGIES: list[Topology] = [
    (1, 0, 1), (1, 2, 1), (2, 1, 1), (2, 3, 1), (2, 2, 2), (4, 1, 4), (4, 3, 2), (4, 0, 1),
]  # fmt: skip


def overrides(topology: Topology) -> list[str]:
    _, stage, sp = topology
    batch = ["train.rows_per_step=12", "train.micro_batch=1", "train.steps=4"]
    return [f"zero.stage={stage}", f"parallel.sp={sp}", *batch]


def newest(config: Config) -> Checkpoint:
    found = newest_checkpoint(Path(config.run.dir))
    assert found is not None
    return found


def assembled(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of every whole parameter and Adam moment, whoever holds which part."""
    return {
        f"{name}/{key}": hashlib.sha256(
            checkpoint.read(name, key, 0, checkpoint.num_elements(name)).numpy().tobytes()
        ).hexdigest()
        for name in sorted(checkpoint.shapes)
        for key in STATE
    }


def load_and_save(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
    """Loads the newest checkpoint into an engine, and saves what the engine then holds."""
    run = start(config, launch)
    saver = Saver(run.dir.with_name("copy"), config.checkpoint)
    saver.save(run.state.step, run.engine.parameter_slices(), describe_state(run))
    return 0


def check_move(tiny: TinyRuns, saved: Topology, resumed: Topology, dtype: str) -> None:
    """Train two steps on `saved` and two on `resumed`."""
    both = f"train.dtype={dtype}"
    first = tiny("run", *overrides(saved), both, "train.stop_at=2")
    tiny.finish(first, saved[0])
    second = tiny("run", *overrides(resumed), both)
    copy = Job(second, resumed[0], run=load_and_save)
    assert set(copy.wait()) == {0}, copy.output()
    # What the engine holds is what was saved, to the last bit of weights and both moments.
    assert assembled(newest(tiny("copy"))) == assembled(newest(first))

    tiny.finish(second, resumed[0])
    straight = tiny("straight", *overrides(saved), both)
    tiny.finish(straight, saved[0])
    if saved == resumed:
        assert final_state(second) == final_state(straight)
    else:
        assert losses(Path(second.run.dir)) == pytest.approx(
            losses(Path(straight.run.dir)), rel=1e-5 if dtype == "fp32" else 1e-3
        )


@pytest.mark.parametrize(
    ("saved", "resumed", "dtype"),
    [
        ((2, 2, 1), (2, 2, 1), "fp32"),
        ((2, 3, 1), (1, 1, 1), "fp32"),
        ((1, 0, 1), (2, 3, 2), "fp32"),
        ((2, 1, 2), (3, 2, 1), "fp32"),
        ((2, 2, 1), (2, 3, 1), "bf16"),
        ((2, 1, 1), (2, 1, 1), "bf16"),
    ],
)
def test_a_run_moves_to_other_ranks(
    tiny: TinyRuns, saved: Topology, resumed: Topology, dtype: str
) -> None:
    check_move(tiny, saved, resumed, dtype)


@pytest.mark.faults
@pytest.mark.parametrize(("saved", "resumed"), [*itertools.product(TOPOLOGIES, TOPOLOGIES)])
def test_every_pair_of_topologies(tiny: TinyRuns, saved: Topology, resumed: Topology) -> None:
    check_move(tiny, saved, resumed, "fp32")


@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_on_the_host_trains_and_resumes_like_any(tiny: TinyRuns, stage: int) -> None:
    on_host = (
        f"zero.stage={stage}", "zero.offload_optimizer=true", "train.dtype=bf16",
        "guards.replica_every=1",
    )  # fmt: skip
    straight, cut = tiny("straight", *on_host), tiny("cut", *on_host)
    tiny.finish(straight, 2)
    tiny.finish(tiny("cut", *on_host, "train.stop_at=3"), 2)
    tiny.finish(cut, 2)
    assert final_state(cut) == final_state(straight)
    on_device = tiny("device", f"zero.stage={stage}", "train.dtype=bf16")
    tiny.finish(on_device, 2)
    assert losses(Path(cut.run.dir)) == pytest.approx(losses(Path(on_device.run.dir)), rel=1e-3)


def test_optimizer_settings_come_from_the_configuration_not_from_the_file(tiny: TinyRuns) -> None:
    tiny.finish(tiny("run", "train.stop_at=2", "optim.weight_decay=0.3"))

    def check(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
        groups = start(config, launch).engine._optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
        assert all(group["betas"] == (0.8, 0.9) for group in groups)
        return 0

    for stage in range(4):
        changed = ("optim.weight_decay=0.7", "optim.betas=[0.8,0.9]", f"zero.stage={stage}")
        job = Job(tiny("run", *changed), run=check)
        assert job.wait() == [0], job.output()
