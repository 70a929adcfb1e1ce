"""Speed of preparing, planning and serving data with one process on this machine.

Seconds are this process's CPU time, so that results on a busy machine equal those on an idle one.
"""

import multiprocessing
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tensorlm.data.loader import PackedRows, RowPhase
from tensorlm.data.packing import plan_rows
from tensorlm.data.prepare.encode import ShardJob, batches, encode, encode_shard
from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import plan_shards, read_documents
from tensorlm.data.prepare.resume import Settings
from tensorlm.data.prepare.workers import Progress
from tensorlm.data.shards import Corpus
from tensorlm.data.tokenizer.tokenizers import copy_tokenizer, load_tokenizer
from tensorlm.data.tokenizer.training import train_tokenizer

SEQ_LENS = (4096, 32_768, 131_072)
_MEAN_LENGTH, _SIGMA = 3000, 1.0
_SERVE_SECONDS = 2.0


def measure_planning(num_documents: int) -> Iterator[str]:
    """Measure packing of documents with log-normal lengths (mean 3,000 tokens, sigma 1)."""
    rng = np.random.default_rng(0)
    mean = np.log(_MEAN_LENGTH) - _SIGMA**2 / 2
    lengths = np.maximum(rng.lognormal(mean, _SIGMA, num_documents), 1).astype(np.int64)
    for seq_len in SEQ_LENS:
        started = time.process_time()
        plan = plan_rows(lengths, seq_len, "best_fit", 0)
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield (
            f"plan: {num_documents:,} documents into {plan.num_rows:,} rows of {seq_len:,}: "
            f"{seconds:.1f} s, {plan.fill:.3%} full, peak memory {peak:.2f} GiB"
        )


def measure_data(tokenizer: Path | None, num_bytes: int) -> Iterator[str]:
    """Measure preparing and serving source files of the standard library."""
    stdlib = sysconfig.get_path("stdlib")
    files = find_files([f"{stdlib}/**/*.py"], ["*/site-packages/*", "*/test/*", "*/tests/*"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if tokenizer is None:
            tokenizer = folder / "tokenizer"
            train_tokenizer(read_documents(files, "text", 4_000_000), 4096, tokenizer)
        yield _measure_preparing(files, tokenizer, folder / "data", num_bytes)
        corpus = Corpus(folder / "data/train")
        for seq_len in SEQ_LENS:
            yield _measure_serving(corpus, seq_len)


def _measure_preparing(files: list[str], tokenizer: Path, output: Path, num_bytes: int) -> str:
    encode(files, tokenizer, output, max_bytes=num_bytes)
    parts = [part for shard in plan_shards(files, "text", num_bytes, num_bytes) for part in shard]
    scratch = output.with_name("scratch")
    (scratch / "train").mkdir(parents=True)
    copy_tokenizer(tokenizer, scratch / "tokenizer")
    settings = Settings(
        tokenizer_sha256="", text_field="text", holdout=0.0, max_bytes=num_bytes,
        shard_bytes=num_bytes,
    )  # fmt: skip
    job = ShardJob(scratch, settings, tokenizer, 0, tuple(parts))
    texts = list(read_documents(files, "text", num_bytes))
    backend = load_tokenizer(scratch / "tokenizer").backend_tokenizer
    progress = Progress(multiprocessing.get_context("forkserver"))

    def tokenize() -> None:
        for batch in batches(iter(texts)):
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                assert encoding.ids is not None

    encode_shard(job, progress)  # loads the tokenizer
    alone, prepared = float("inf"), float("inf")
    for _ in range(4):
        alone = min(alone, _seconds(tokenize))
        prepared = min(prepared, _seconds(lambda: encode_shard(job, progress)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    return (
        f"prepare: {size:.1f} MB, tokenizer alone {size / alone:.2f} MB/s, a worker "
        f"{size / prepared:.2f} MB/s ({alone / prepared:.1%})"
    )


def _seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _measure_serving(corpus: Corpus, seq_len: int) -> str:
    rows = PackedRows([corpus], [1.0], [RowPhase(seq_len, None)], "best_fit", 0, 1)
    num_rows = rows.sources[0].last_plan.num_rows
    for index in range(num_rows):  # into the page cache
        rows.batch(range(index, index + 1))
    started, served = time.process_time(), 0
    while (seconds := time.process_time() - started) < _SERVE_SECONDS:
        rows.batch(range(served, served + 1))
        served += 1
    rate = served * seq_len / seconds / 1e6
    return f"serve: rows of {seq_len:,}: {rate:.0f} M tokens/s"
