"""Encoding texts into token shards: the same bytes for any number of workers and after any kill.

The inputs are divided into shards before they are read. A worker reads the parts of one shard,
encodes their documents, holds some out, and writes the shard of each split atomically. Finished
shards are never encoded again. The index, which makes a split readable, is written after all its
shards.
"""

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tensorlm.runtime.errors import UserError
from tensorlm.runtime.progress import progress_bar

from ..shards import is_complete, read_header, shard_name
from ..tokenizer.reading import check_plain_reading
from ..tokenizer.tokenizers import DocumentEncoder, copy_tokenizer, tokenizer_sha256
from .readers import LONGEST_DOCUMENT, Part, read_part
from .resume import Settings, begin, output_locked
from .shard_writer import ShardWriter, Vocabulary, write_index
from .workers import Progress, Ranks, run_tasks

SHARD_BYTES = 1 << 26
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 64, 1 << 21


class ShardJob(NamedTuple):
    """A shard to encode, and the settings for it."""

    output: Path
    settings: Settings
    tokenizer: Path  # as given by the user
    number: int
    parts: tuple[Part, ...]
    longest: int = LONGEST_DOCUMENT  # bytes

    @property
    def is_done(self) -> bool:
        """Whether the shard exists in every split, with all its files."""
        name = f"{shard_name(self.number)}.json"
        return all(is_complete(self.output / split / name) for split in self.settings.splits)


def encode(
    files: list[str],
    tokenizer: Path,
    output: Path,
    *,
    text_field: str = "text",
    max_bytes: int = 0,
    shard_bytes: int = SHARD_BYTES,
    holdout: float = 0.0,
    workers: int = 1,
    longest: int = LONGEST_DOCUMENT,
) -> str:
    """Encode documents into shards `output/train`, `output/valid`; returns a one-line summary.

    Each document becomes BOS, its ids, EOS. The tokenizer is copied to `output/tokenizer`. Under
    `mpirun` or `srun`, every rank calls this function and does a share; rank 0 returns the summary.
    After a kill, repeat the call to continue. Repeating a finished call restores missing parts of
    the data set, or does nothing. Only one call at a time can work on an output.

    Args:
        files: from `find_files`.
        tokenizer: a Hugging Face folder, or a sentencepiece model.
        output: folder of the data set.
        text_field: field (column) that holds the text.
        max_bytes: stop after this many bytes of input (0: read all).
        shard_bytes: input bytes per shard.
        holdout: share of the documents that go to `valid`, chosen only by their text.
        workers: number of processes of this rank; 1 uses the tokenizer's threads instead.
        longest: maximum bytes of a document, or of a record of a JSON file.

    Raises:
        UserError: inputs cannot be read, the disk is full, or the output was begun with other
            settings or is in use.
    """

    def prepare() -> tuple[list[ShardJob], tuple[str, ...], int]:
        settings = Settings(
            tokenizer_sha256=tokenizer_sha256(tokenizer), text_field=text_field, holdout=holdout,
            max_bytes=max_bytes, shard_bytes=shard_bytes,
        )  # fmt: skip
        lock.enter_context(output_locked(output))
        shards = begin(output, settings, files)
        copy_tokenizer(tokenizer, output / "tokenizer")
        jobs = [
            ShardJob(output, settings, tokenizer, number, tuple(parts), longest)
            for number, parts in enumerate(shards)
        ]
        _encoder_of(jobs[0])  # reports a bad tokenizer early, and only once
        check_plain_reading(output / "tokenizer", "llama", named=tokenizer)
        return [job for job in jobs if not job.is_done], settings.splits, len(jobs)

    with Ranks() as ranks, contextlib.ExitStack() as lock:
        jobs, splits, num_shards = ranks.from_first(prepare)
        started = time.monotonic()
        with _progress_bar(jobs, is_shown=ranks.rank == 0) as report:
            run_tasks(jobs, encode_shard, ranks, workers, report)
        seconds = time.monotonic() - started
        summary = ranks.from_first(lambda: _finish(output, splits, num_shards, len(jobs), seconds))
        return summary if ranks.rank == 0 else ""


@contextlib.contextmanager
def _progress_bar(jobs: list[ShardJob], is_shown: bool) -> Iterator[Callable[[list[int]], None]]:
    """Progress bar; yields the function to call with (documents, tokens, bytes) done so far."""
    total = sum(part.num_bytes for job in jobs for part in job.parts)
    started = time.monotonic()
    with progress_bar(total, "B", "encode", is_shown=is_shown and bool(jobs)) as bar:

        def report(counts: list[int]) -> None:
            documents, tokens, num_bytes = counts
            seconds = max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(
                f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s"
            )
            bar.update(num_bytes - bar.n)

        yield report


def _encoder_of(job: ShardJob) -> DocumentEncoder:
    folder = job.output / "tokenizer"
    return _load_encoder(folder, job.settings.tokenizer_sha256, job.tokenizer)


@cache
def _load_encoder(folder: Path, _: str, named: Path) -> DocumentEncoder:
    """Load once per process, for each hash of the tokenizer's files."""
    return DocumentEncoder(folder, named)


def encode_shard(job: ShardJob, progress: Progress) -> None:
    """Encode one shard for each split."""
    encoder, settings = _encoder_of(job), job.settings
    vocabulary = Vocabulary(
        encoder.vocab_size, encoder.bos_id, encoder.eos_id, settings.tokenizer_sha256
    )
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(job.output / split, job.number, vocabulary))
            for split in settings.splits
        }
        num_read = 0  # since the last report

        def count(num_bytes: int) -> None:
            nonlocal num_read
            num_read += num_bytes

        field, parts, longest = settings.text_field, job.parts, job.longest
        for texts in batches(t for part in parts for t in read_part(part, field, count, longest)):
            documents, contents = encoder(texts), [text.encode() for text in texts]
            is_held_out = [settings.holdout > 0 and _place(c) < settings.holdout for c in contents]
            for split, writer in writers.items():
                here = [held == (split == "valid") for held in is_held_out]
                writer.add(
                    list(itertools.compress(documents, here)),
                    sum(map(len, itertools.compress(contents, here))),
                )
            progress.add(len(texts), sum(map(len, documents)), num_read)
            num_read = 0
        progress.add(0, 0, num_read)


def _place(content: bytes) -> float:
    """A number in [0, 1) that depends only on a document's text."""
    return float(int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Group documents into batches for the tokenizer's threads, of limited size."""
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _nothing_to_train_on(output: Path, splits: tuple[str, ...], num_shards: int) -> str:
    """The error message if there are no training documents."""
    names = [f"{split}/{shard_name(n)}.json" for split in splits for n in range(num_shards)]
    total = sum(read_header(output / name).num_documents for name in names)
    held_out, fix = (", since all are held out", " or lower --holdout") if total else ("", "")
    return (
        f"{output}: train must have at least 1 document, got 0 of {total}{held_out} "
        f"(add texts{fix}; choose another --output or remove this one)"
    )


def _finish(
    output: Path, splits: tuple[str, ...], num_shards: int, num_made: int, seconds: float
) -> str:
    """Write the indexes; returns a one-line summary, and notes."""
    parts, notes = [], ""
    for split in splits:
        names = [f"{shard_name(number)}.json" for number in range(num_shards)]
        headers = [read_header(output / split / name) for name in names]
        documents = sum(header.num_documents for header in headers)
        if split == "train" and not documents:
            raise UserError(_nothing_to_train_on(output, splits, num_shards))
        write_index(output / split, num_shards)
        notes += "" if documents else f"\nnote: {output / split} is empty (raise --holdout)"
        tokens = sum(header.num_tokens for header in headers)
        parts.append(f"{split} {documents:,} documents, {tokens:,} tokens")
    made = f"{num_made} shards in {tqdm.format_interval(seconds)}" if num_made else "nothing to do"
    kept = f", {num_shards - num_made} shards existed" if num_made < num_shards else ""
    return f"{output}: {'; '.join(parts)} ({made}{kept}){notes}"
