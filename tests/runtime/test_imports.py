"""Imports without the garbage collector, which works again afterwards."""

import gc
import subprocess
import sys

import pytest

from tests.support.launching import ROOT, launch_environment

# The collector notices what was imported neither during the import nor later.
IMPORTS = """
import gc
from tensorlm.runtime.imports import without_collection

collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
with without_collection():
    import torch
assert not collections
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
assert len(gc.get_objects()) < 1000

class Node:
    def __del__(self):
        print("collected")

node = Node()
node.itself = node
del node
gc.collect()
"""


def test_collector_neither_scans_what_is_imported_nor_misses_other_garbage() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.stdout, result.returncode) == ("collected\n", 0), result.stderr


def test_imported_bindings_report_no_leak_at_the_end() -> None:
    script = "from tensorlm.runtime.imports import without_collection\n"
    script += "with without_collection():\n    import triton"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.stderr, result.returncode) == ("", 0)


def test_collector_is_enabled_again_after_a_failed_import() -> None:
    from tensorlm.runtime.imports import without_collection

    with pytest.raises(ImportError), without_collection():
        import tensorlm.nothing  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
