"""Starting an evaluation: from launcher/evaluate.py, or during training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from transformers.utils import logging

from fold_parallel import Grid, create_grid
from tensorlm.config import Config
from tensorlm.config.evaluation import WINDOW_TASKS
from tensorlm.data.tokenizer.tokenizers import load_tokenizer
from tensorlm.hf.llama_config import describe_unused
from tensorlm.runtime.errors import EXIT_DONE, UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.ranks import join_ranks, leave_distributed
from tensorlm.runtime.watchdog import Watchdog

from .describe import describe_call
from .model import EvaluatedModel, open_checkpoint_model, open_hugging_face_model, open_random_model
from .output import check_output, is_writable
from .report import format_report, log_to_tensorboard, write_reports
from .results import Report
from .run import evaluate
from .text import Documents, choose_spans, held_out_documents


def evaluate_on_ranks(
    config: Config,
    launch: LaunchEnv,
    step: int | None,
    hugging_face: Path | None,
    is_random: bool,
    output: Path | None,
) -> int:
    """Evaluate the checkpoint of `step`, a folder, or random weights; rank 0 writes the report.

    Several ranks share prompts and windows; with `parallel.sp` > 1 they also share each window.

    Raises:
        UserError: a mistake that the user can correct; or, after the report is written, lengths
            that did not fit into memory.
    """
    if hugging_face and not (hugging_face / "config.json").exists():
        raise UserError(
            f"{hugging_face}: must contain config.json (write the folder with launcher/convert.py "
            "export)"
        )
    folder = hugging_face or Path(config.data.path) / "tokenizer"
    logging.set_verbosity_error()  # suppress a warning that `tensorlm` is an unknown model
    documents = _open_documents(config, config.eval.lengths, folder)
    if output is None and hugging_face:
        # Not in the folder itself, which may be read-only, or be uploaded later.
        output = Path(config.run.dir) / "eval" / f"hf-{hugging_face.resolve().name}"
    elif output is None and is_random:
        output = run_output(config, None)
    check_output(output or Path(config.run.dir) / "eval")  # the step is not known yet
    device, grid = _join_ranks(config, launch, is_sharded=hugging_face is None)
    if hugging_face:
        unused = describe_unused(hugging_face, config.model)
        if unused and launch.rank == 0:
            print(f"note: --hf: {unused}", flush=True)
        model = open_hugging_face_model(config, hugging_face, device, grid)
    elif is_random:
        model = open_random_model(config, device, grid)
    else:
        model = open_checkpoint_model(config, step, device, grid)
    output = output or run_output(config, model.step)
    with _watched(config, launch, model, output):
        report = evaluate(config.eval, model, documents)
    if launch.rank == 0:
        _publish(report, config, model.step, output)
    if launch.world_size > 1:
        leave_distributed()
    if report.problems:
        raise UserError(*report.problems)
    return EXIT_DONE


@contextmanager
def _watched(
    config: Config, launch: LaunchEnv, model: EvaluatedModel, output: Path
) -> Iterator[None]:
    """End several ranks if they hang in the body; stacks go to `output`."""
    if launch.world_size == 1:
        yield
        return
    watchdog = Watchdog(output, launch.rank, launch.world_size, **config.guards.limits)
    dist.barrier()  # until rank 0 has removed the reports of an earlier hang
    watchdog.enter("eval", model.step or 0)
    model.on_progress = watchdog.progress
    yield
    watchdog.stop()


def _publish(report: Report, config: Config, step: int | None, output: Path) -> None:
    """Write the report to `output` and the run's TensorBoard, and print it."""
    report = _described(report, config, output)
    write_reports(output, [report])
    events = Path(config.run.dir) / "tensorboard"
    if step is None or not is_writable(events):  # such as another user's run
        events = output / "tensorboard"
    with SummaryWriter(str(events), filename_suffix=".eval") as writer:
        log_to_tensorboard(writer, report, step or 0)
    print(format_report([report]))
    print(*report.notes, f"report: {output / 'report.html'}", sep="\n", flush=True)


def check_held_out(config: Config) -> None:
    """Raise UserError unless there is held-out text for the evaluations of a training run."""
    lengths = config.eval.lengths or (config.data.seq_len,)
    _open_documents(config, lengths, Path(config.data.path) / "tokenizer")


def _open_documents(config: Config, lengths: Sequence[int], tokenizer_folder: Path) -> Documents:
    """Open the held-out documents; raise UserError before the model is loaded if they are short."""
    documents = held_out_documents(config, load_tokenizer(tokenizer_folder), tokenizer_folder)
    if "ppl" in config.eval.tasks and lengths:
        choose_spans(documents, config.eval.span_length(lengths), max_tokens=1)
    elif "recall" in config.eval.tasks and lengths:
        choose_spans(documents, max(lengths), max_tokens=1)
    return documents


def evaluate_in_training(
    config: Config, model: EvaluatedModel, writer: SummaryWriter | None
) -> None:
    """Evaluate the model during training; the rank with a `writer` reports.

    Lengths that do not fit are reported and skipped, and training continues.

    Raises:
        LeftError: on all ranks, if the run must end; nothing is reported then.
    """
    documents = held_out_documents(config, model.tokenizer, Path(config.data.path) / "tokenizer")
    model.network.eval()
    try:
        report = evaluate(config.eval, model, documents)
    finally:
        model.network.train()
    if writer:
        assert model.step is not None
        output = run_output(config, model.step)
        report = _described(report, config, output)
        write_reports(output, [report])
        log_to_tensorboard(writer, report, model.step)
        print(format_report([report]), *report.problems, *report.notes, sep="\n", flush=True)


def _described(report: Report, config: Config, output: Path) -> Report:
    return report.model_copy(update={"facts": report.facts | describe_call(config, output)})


def run_output(config: Config, step: int | None) -> Path:
    """Folder for the report of a step of the run; None: of random weights."""
    name = "random" if step is None else f"step-{step:08d}"
    return Path(config.run.dir) / "eval" / name


def _join_ranks(config: Config, launch: LaunchEnv, is_sharded: bool) -> tuple[torch.device, Grid]:
    """This rank's device, and the grid; a single rank processes whole windows for any `sp`."""
    if launch.world_size == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), Grid()
    lengths = config.eval.lengths or (config.data.seq_len,)
    if is_sharded:
        shared = lengths if set(config.eval.tasks) & set(WINDOW_TASKS) else ()
        config.check_ranks(launch.world_size, shared)
    return join_ranks(launch), create_grid(config.parallel.sp if is_sharded else 1)
