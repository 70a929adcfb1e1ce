"""An interpreter that can import neither this project nor its kernels, started once.

It imports transformers and then forks for each piece of code: fresh, without the seconds of
imports that every piece has in common.
"""

import atexit
import functools
import json
import select
import subprocess
import sys
from pathlib import Path

_SECONDS = 300
_SERVER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorlm", "tensor_attention", "fold_parallel"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())

import gc, json, os, traceback
gc.disable()  # what is imported is no garbage, now or in a fork
import torch.distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaForCausalLM
gc.freeze()
gc.enable()

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what code prints is no answer
for line in sys.stdin:
    code, arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__", "sys": sys})
            left = 0
        except BaseException:
            traceback.print_exc()
            left = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    # -I: neither this folder nor PYTHONPATH is searched.
    server = subprocess.Popen(
        [sys.executable, "-I", "-c", _SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def run_without_us(code: str, *arguments: str | Path, cwd: Path) -> None:
    """Run `code`, with `arguments` in sys.argv, where this project cannot be imported.

    Raises:
        AssertionError: if it raises, or does not end within 5 minutes; stderr shows why.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([code, list(map(str, arguments)), str(cwd)]), file=server.stdin, flush=True)
    ready, _, _ = select.select([server.stdout], [], [], _SECONDS)
    if not ready:
        server.kill()
        _server.cache_clear()
    assert ready, f"not done in {_SECONDS} s"
    assert server.stdout.readline() == "0\n"
