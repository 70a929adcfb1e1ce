"""The memory of import and export depends on the largest parameter, not on the model."""

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensorlm.benchmarks.conversion import write_random_llama
from tensorlm.checkpoint import select_checkpoint
from tensorlm.config import load_config
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.hf.import_folder import import_weights

MIB = 1 << 20
# 94 MiB in fp32; the largest parameter has 1 MiB.
SHAPE = ["model.hidden_size=256", "model.intermediate_size=1024", "model.num_layers=24"]
LIMIT = 24 * MIB


def resident(which: str) -> int:
    """Bytes in memory, mapped files included: `VmRSS` now, `VmHWM` at the peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{which}:\s+(\d+) kB", status)[0]) * 1024


@contextmanager
def limited_memory() -> Iterator[None]:
    """The body adds at most `LIMIT` to this process's memory."""
    ctypes.CDLL(None).malloc_trim(0)  # what others freed would hide what the body takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    except OSError:
        pytest.skip("this kernel does not forget the peak of memory")
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < LIMIT


def test_conversions_hold_a_fraction_of_the_model(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorlm.checkpoint.publish._WEIGHT_FILE_BYTES", 2 * MIB)
    monkeypatch.setattr("tensorlm.hf.export_folder._CHUNK", MIB // 4)  # elements
    settings = load_config(config, [*SHAPE, "model.fold=[]"])
    write_random_llama(settings, tmp_path / "llama")
    with limited_memory():
        import_weights(tmp_path / "llama", settings)
    with limited_memory():
        checkpoint = select_checkpoint(tmp_path / "run", None)
    with limited_memory():
        export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    assert (tmp_path / "hf/model.safetensors").stat().st_size > 3.5 * LIMIT
