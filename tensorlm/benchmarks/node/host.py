"""What the parts share: the host's GPUs, the folder, the time that is left, the model's shape."""

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tensorlm.config import Config, load_config
from tensorlm.data.prepare.encode import encode
from tensorlm.data.prepare.inputs import read_documents
from tensorlm.data.prepare.packages import installed_packages
from tensorlm.data.tokenizer.training import train_tokenizer
from tensorlm.model.flops import find_board
from tensorlm.plan.gpus import GPUS, Gpu
from tensorlm.runtime.disk import atomic_folder, replace_file

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs/llama8b_32k_1gpu.toml"  # its memory settings suit any number of GPUs
_VOCABULARY = 4096
_DOCUMENTS = (3_000, 48_000, 12_000, 192_000, 768_000)  # lengths in characters
# Without a long warmup, a rate at which the loss of fresh weights falls from the first step.
_COMMON = (
    "optim.lr=6e-6", "optim.min_lr=6e-7", "optim.warmup_steps=1", "checkpoint.every=0",
    "data.verify=false",
)  # fmt: skip
_TINY = (
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=192",
    "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.window=64",
    "model.route={block=8,top_k=2,stretch=16}", "train.mlp_chunk=0",
)  # fmt: skip


class Host:
    """A host with `ranks` GPUs (or CPU ranks); `folder` keeps data from one call to the next.

    `tiny` replaces the 8 B model and its lengths with small ones, for a try on any machine.
    """

    def __init__(
        self, folder: Path, ranks: int, seconds: float, host_memory: float, tiny: bool
    ) -> None:
        self.folder, self.ranks, self.tiny = folder, ranks, tiny
        self.host_memory = host_memory  # bytes
        self.on_gpu = torch.cuda.is_available()
        self._deadline = time.monotonic() + seconds
        self._is_stopped = False

    @property
    def sheet(self) -> Gpu | None:
        """The data sheet of the GPUs, if it is known."""
        board = find_board(torch.cuda.get_device_name()) if self.on_gpu else None
        return next((gpu for gpu in GPUS.values() if gpu.name == board), None)

    @property
    def seconds_left(self) -> float:
        """Seconds until the limit; 0 once a signal has asked to stop."""
        return 0.0 if self._is_stopped else max(0.0, self._deadline - time.monotonic())

    def listen(self) -> None:
        """Stop on SIGTERM and SIGINT: what has been measured is still reported."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self._is_stopped = True

    def length(self, tokens: int) -> int:
        """`tokens`, or 1/64 of it for the tiny model."""
        return tokens // 64 if self.tiny else tokens

    def settings(self, name: str, *more: str) -> list[str]:
        """Settings of the run `name` in this folder, those of `more` last."""
        own = [f"run.dir={self.folder / name}", f"data.path={self.folder / 'data'}"]
        return [*own, *_COMMON, *(_TINY if self.tiny else ()), *more]

    def config(self, settings: Sequence[str]) -> Config:
        """The configuration of a run with these settings."""
        return load_config(CONFIG, settings)

    @property
    def long_text(self) -> Path:
        """A file with one long text, to be evaluated."""
        return self.folder / "long.txt"

    def prepare_data(self) -> None:
        """Encode the source of this Python's packages, unless done before.

        Then several parts can be measured at the same time: encoding locks its output.
        """
        texts, tokenizer = self.folder / "texts.jsonl", self.folder / "tokenizer"
        complete = self.folder / "data.complete"
        if complete.exists():
            return
        size = 400_000 if self.tiny else 24_000_000
        self.folder.mkdir(parents=True, exist_ok=True)
        if not texts.exists():
            documents = list(cut_documents(size))
            self.long_text.write_text("\n".join(documents)[: size // 10])
            lines = (json.dumps({"text": text}) + "\n" for text in documents)
            replace_file(texts, "".join(lines).encode())
        if not tokenizer.exists():
            with atomic_folder(tokenizer) as target:
                sample = read_documents([str(texts)], "text", size // 6)
                train_tokenizer(sample, 512 if self.tiny else _VOCABULARY, target)
        encode(
            [str(texts)], tokenizer, self.folder / "data", shard_bytes=size // 24,
            workers=min(16, os.cpu_count() or 1),
        )  # fmt: skip
        complete.touch()


def cut_documents(num_chars: int) -> Iterator[str]:
    """Documents of very different lengths, `num_chars` characters in total."""
    sizes = itertools.cycle(_DOCUMENTS)
    for package in installed_packages():
        start = 0
        while start < len(package.text) and num_chars > 0:
            text = package.text[start : start + next(sizes)][:num_chars]
            start, num_chars = start + len(text), num_chars - len(text)
            yield text
        if num_chars <= 0:
            return
