"""The command `tensorlm NAME`.

Each name runs the same code as a file of launcher/, with the same settings, errors and exit codes.
The files are for DeepSpeed and Slurm, which start files.
"""

import sys
from importlib import import_module
from typing import NamedTuple

from tensorlm import __version__
from tensorlm.runtime.errors import EXIT_DONE, EXIT_USER_ERROR
from tensorlm.runtime.imports import without_collection


class Entry(NamedTuple):
    """A module of this package, and the arguments to insert before the user's.

    `usage`: the help text, if that of the module is about more than this command.
    """

    module: str
    help: str
    arguments: tuple[str, ...] = ()
    usage: str = ""


_REPLAY = """usage: tensorlm replay STEP --config FILE [key.sub=value ...]

Recompute one step from the newest checkpoint before it, and compare its loss with the one recorded
in metrics.jsonl. Nothing is written. With the same number of ranks and the same kind of machine, a
different loss means that the hardware, not the data, was at fault.

  STEP           number of the step, from 1
  --config FILE  TOML file of the run
  key.sub=value  settings that replace those of the file, such as run.dir=runs/first"""
_COMPARE = """usage: tensorlm compare DIR [DIR ...] --output DIR

Join the reports below these folders: lengths of one model become one report, and several models
appear side by side.

  DIR           folder that contains a report.json at any depth
  --output DIR  folder for the joint report"""

COMMANDS = {
    "prepare": Entry("prepare", "encode documents into token shards; verify and inspect shards"),
    "tokenizer": Entry("prepare", "train a sentencepiece BPE tokenizer", ("tokenizer",)),
    "plan": Entry("plan", "predict the memory and time of a run, without a GPU"),
    "train": Entry("train", "start or continue a training run on the ranks of this job"),
    "replay": Entry(
        "train", "recompute one step and compare it with the log", ("--replay",), _REPLAY
    ),
    "evaluate": Entry(
        "evaluate", "measure how well a checkpoint uses its context, and write a report"
    ),
    "compare": Entry("evaluate", "join evaluation reports into one", ("--compare",), _COMPARE),
    "convert": Entry("convert", "export a checkpoint to a Hugging Face folder, or import one"),
    "benchmark": Entry("benchmark", "measure speed and memory on this machine"),
    "generate": Entry("generate", "generate text with an exported folder"),
}


def main() -> None:
    """Run the command named by the first argument, and end the process with its exit code."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(f"tensorlm {__version__}")
        sys.exit(EXIT_DONE)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        sys.exit(EXIT_DONE if words else EXIT_USER_ERROR)
    name, *rest = words
    if name not in COMMANDS:
        names = ", ".join(COMMANDS)
        print(f"error: tensorlm: {name}: must be one of {names}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    command = COMMANDS[name]
    is_help = rest[:1] in (["-h"], ["--help"])
    if is_help and command.usage:
        print(command.usage)
        sys.exit(EXIT_DONE)
    # A sub-command of the module adds its own name to the program's.
    sys.argv = ["tensorlm" if command.arguments == (name,) else f"tensorlm {name}"]
    sys.argv += [*command.arguments, *rest]
    with without_collection():
        module = import_module(f"tensorlm.commands.{command.module}")
    module.run()


def usage() -> str:
    """Help text: all commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    help_of_one = "Run `tensorlm NAME --help` for the arguments of a command."
    return "\n".join(["usage: tensorlm NAME [arguments]", "", *lines, "", help_of_one])
