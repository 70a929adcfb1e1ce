"""The files of launcher/ in a fork of the test process, which has imported everything already."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.support.launching import ROOT, launch_environment

Completed = subprocess.CompletedProcess[str]


def run_forked(script: str, *arguments: str, seconds: float = 120) -> Completed:
    """Run `python launcher/SCRIPT arguments` in a fork, which has imported everything already.

    The fork is a process of its own, with an exit code; only the seconds of imports are saved.
    """
    with tempfile.TemporaryDirectory() as name:
        output, errors = Path(name) / "stdout", Path(name) / "stderr"
        fork = multiprocessing.get_context("fork").Process(
            target=_run_script, args=(ROOT / "launcher" / script, arguments, output, errors)
        )
        fork.start()
        fork.join(seconds)
        fork.kill()
        fork.join()
        assert fork.exitcode is not None
        command = [script, *arguments]
        return Completed(command, fork.exitcode, output.read_text(), errors.read_text())


def _run_script(script: Path, arguments: tuple[str, ...], output: Path, errors: Path) -> None:
    gc.freeze()  # a collection would copy all that the parent has imported
    code: Any = 1
    try:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - as long as the process
        for number, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        # The tokenizer's threads are not in a fork.
        os.environ.update(launch_environment() | {"TOKENIZERS_PARALLELISM": "false"})
        os.chdir(ROOT)
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
