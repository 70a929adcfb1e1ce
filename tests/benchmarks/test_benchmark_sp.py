"""The benchmark of a shared layer counts what is sent; its projection is the stated formula."""

import json
import math
from pathlib import Path

import pytest
import torch.distributed as dist

from fold_parallel import layer_traffic
from tensorlm.benchmarks import sp as bench
from tensorlm.config import Config, load_config
from tensorlm.model.flops import linear_flops_per_token
from tensorlm.plan.exchange import Machine, format_projection, project_all
from tensorlm.runtime.launch_env import LaunchEnv
from tests.fold_parallel.backends import ranks_and_backends
from tests.support.distributed import run_distributed
from tests.support.forked import run_forked
from tests.support.launching import ROOT


def measure(configs: list[Config]) -> list[bench.LayerCost]:
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = LaunchEnv(rank, size, rank, size, "127.0.0.1", 0)
    return [bench.measure(config, launch, repeats=1) for config in configs]


@ranks_and_backends(2)
def test_counted_bytes_are_those_of_the_formula(
    world_size: int, backend: str, config: Path
) -> None:
    shared = [f"parallel.sp={world_size}", "train.micro_batch=2"]
    configs = [load_config(config, [*shared, *more]) for more in ([], ["model.fold=[]"])]
    ranks = run_distributed(measure, world_size, configs, backend=backend)
    for one, cost in zip(configs, ranks[0], strict=True):
        expected = [
            layer_traffic(
                128, world_size, one.model.fold, heads=4, key_heads=2, head_dim=8, itemsize=4,
                backward=backward,
            )
            for backward in (False, True)
        ]  # fmt: skip
        assert [cost.forward_bytes, cost.backward_bytes] == [sum(sizes) for sizes in expected]
        rows = {bench.LAYER, bench.ATTENTION}
        rows |= {bench.SERIAL, bench.SWAP} if one.model.fold else set()
        assert cost.milliseconds.keys() == rows
        assert all(math.isfinite(t) and t > 0 for pair in cost.milliseconds.values() for t in pair)
        table = bench.format_cost(cost, one)
        assert all(f"| {name} |" in table for name in rows)
    # All ranks tell the times of the slowest.
    assert ranks[0] == ranks[1]


def test_projection_is_the_stated_formula() -> None:
    config = load_config(ROOT / "configs/llama8b_32k_fold.toml", ["data.seq_len=4096"])
    machine = Machine(8, nvlink=100e9, network=10e9, latency=1e-6, flops=1e14, overlap=0.75)
    projections = {p.gpus: p for p in project_all(config, machine)}
    assert list(projections) == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]

    p = projections[16]
    assert p.seq_len == 16 * 4096
    # Of 15 other ranks 7 are in the node and 8 are not; the slower links decide.
    q_k, z, back = (15 / 16 * 4096 * size for size in (40 * 256 + 4, 32 * 260, 32 * 256))
    swaps = [x * 8 / 15 / 10e9 + 15e-6 for x in (q_k, z, back, back, z, q_k - 15 / 16 * 4096 * 4)]
    halo = 15 / 16 * 1023 * 2 * 8 * 256
    assert p.sent_bytes == pytest.approx(
        2 * (q_k + z + back + halo) - 15 / 16 * 4096 * 4, rel=1e-12
    )
    assert p.network_bytes == pytest.approx((p.sent_bytes - 2 * halo) * 8 / 15, rel=1e-12)
    halos = 2 * (halo / 10e9 + 1e-6)
    assert p.exchange_seconds == pytest.approx(sum(swaps) + halos, rel=1e-12)
    hop_1 = 4096 * 4 * 32 * 128 * 1024 / 1e14
    hidden = min(swaps[0], hop_1) + min(swaps[-1], 2 * hop_1)
    assert p.exposed_seconds == pytest.approx(sum(swaps) + halos - 0.75 * hidden, rel=1e-12)
    depths = range(16 * 4096)
    pairs = sum(1 + min(t, 1023) + t // 1024 for t in depths) / len(depths)
    linear = (linear_flops_per_token(config.model) - 2 * 4096 * 128256) / 32
    compute = 3 * 4096 * (linear + 4 * 32 * 128 * pairs) / 1e14
    assert p.compute_seconds == pytest.approx(compute, rel=1e-12)
    assert p.efficiency == pytest.approx(compute / (compute + p.exposed_seconds), rel=1e-12)
    # Inside one node the network is not used.
    assert projections[8].network_bytes == 0


def test_gpus_that_cannot_share_a_row_are_named(config: Path) -> None:
    small = load_config(config)  # fold [16]
    table = format_projection(project_all(small, Machine()), small, Machine())
    assert "| 16 | 2,048 |" in table
    assert table.endswith("GPUs that cannot share such a row: 32, 64, 128, 256, 512, 1024")


def test_the_documented_projection_is_what_the_launcher_prints() -> None:
    settings = ["--config", "configs/llama8b_32k_fold.toml", "parallel.sp=8"]
    result = run_forked("benchmark.py", "sp", *settings, "--only-project")
    table = result.stdout[result.stdout.index("| GPUs = sp") :]
    assert table.count("\n") == 12
    assert table in (ROOT / "docs/sequence_parallelism.md").read_text()


def test_launcher_prints_measurement_and_projection(tmp_path: Path, config: Path) -> None:
    output = tmp_path / "sp.json"
    options = ["--repeats", "1", "--tflops", "1", "--json", str(output)]
    result = run_forked("benchmark.py", "sp", "--config", str(config), *options)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(output.read_text())
    assert "1 x CPU" in numbers["measured"]["ranks"]
    assert numbers["measured"]["forward_bytes"] == 0
    assert [p["gpus"] for p in numbers["projected"]] == [2, 4, 8, 16]
    for text in ("| decoder layer |", "1 TFLOP/s per GPU", "| 16 | 2,048 |"):
        assert text in result.stdout
