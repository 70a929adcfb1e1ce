"""From texts to token shards: the same bytes for any number of workers, and after any kill.

The inputs are cut into shards before anybody reads them. A worker reads the parts of one shard,
encodes their documents, holds some out, and writes the shard of each split whole. What exists is
never made again; the index that makes a split readable is written when all of its shards are there.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tensorlm.errors import UserError

from .inputs import HUB, Part, find_files, plan_shards, read_documents, read_part
from .shard_writer import ShardWriter, write_atomically, write_index
from .shards import INDEX, VERSION, read_header, shard_name
from .tokenizers import DocumentEncoder, copy_tokenizer, tokenizer_sha256
from .workers import Progress, Ranks, run_tasks

__all__ = ["encode", "find_files", "read_documents"]

PLAN = "prepare.json"
SHARD_BYTES = 1 << 28
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 64, 1 << 21


@dataclass(frozen=True)
class ShardJob:
    """What every worker has to know, and the shard that it is to make."""

    output: Path
    splits: tuple[str, ...]
    text_field: str
    holdout: float
    tokenizer_sha256: str
    number: int
    parts: tuple[Part, ...]

    @property
    def is_done(self) -> bool:
        """Whether the shard of every split is there."""
        name = f"{shard_name(self.number)}.json"
        return all((self.output / split / name).exists() for split in self.splits)


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
) -> str:
    """Encode documents into shards `output/train`, `output/valid`; returns a one-line summary.

    Each document becomes BOS, its ids, EOS. The tokenizer is copied to `output/tokenizer`. Under
    `mpirun` or `srun`, every rank calls it and does a share; rank 0 has the summary. A call
    that was killed goes on where it was when it is repeated; one that was done does nothing.

    Args:
        files: from `find_files`.
        tokenizer: a Hugging Face folder, or a sentencepiece model.
        output: folder of the data set.
        text_field: field (column) that holds the text.
        max_bytes: cut the inputs off after this many bytes; 0: read all.
        shard_bytes: input bytes in one shard.
        holdout: share of the documents that go to `valid`, chosen by their text alone.
        workers: processes of this rank. One encodes with the tokenizer's own threads.

    Raises:
        UserError: unreadable inputs, a full disk, or an output that was begun in another way.
    """
    splits = ("train", "valid") if holdout > 0 else ("train",)

    def begin() -> tuple[list[ShardJob], int]:
        plan = plan_shards(files, text_field, shard_bytes, max_bytes)
        if not plan:
            raise UserError(f"{files[0]}: nothing to read (empty, or longer than --max-bytes)")
        sha256 = tokenizer_sha256(tokenizer)
        _begin_output(output, splits, files, plan, text_field, holdout, sha256)
        copy_tokenizer(tokenizer, output / "tokenizer")
        _encoder(output / "tokenizer")  # a bad one is told now, and once
        jobs = [
            ShardJob(output, splits, text_field, holdout, sha256, number, tuple(parts))
            for number, parts in enumerate(plan)
        ]
        return [job for job in jobs if not job.is_done], len(jobs)

    with Ranks() as ranks:
        jobs, num_shards = ranks.from_first(begin)
        started = time.monotonic()
        with _progress_bar(jobs, is_shown=ranks.rank == 0) as report:
            run_tasks(jobs, encode_shard, ranks, workers, report)
        seconds = time.monotonic() - started
        summary = ranks.from_first(lambda: _finish(output, splits, num_shards, len(jobs), seconds))
        return summary if ranks.rank == 0 else ""


@contextlib.contextmanager
def _progress_bar(jobs: list[ShardJob], is_shown: bool) -> Iterator[Callable[[list[int]], None]]:
    """Yields what shows (documents, tokens, bytes) done so far, with rates and the time left."""
    total = sum(part.num_bytes for job in jobs for part in job.parts)
    started = time.monotonic()
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="encode", disable=not (is_shown and jobs)
    ) as bar:

        def report(counts: list[int]) -> None:
            documents, tokens, num_bytes = counts
            seconds = max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(
                f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s"
            )
            bar.update(num_bytes - bar.n)

        yield report


def _begin_output(
    output: Path,
    splits: tuple[str, ...],
    files: list[str],
    plan: list[list[Part]],
    text_field: str,
    holdout: float,
    sha256: str,
) -> None:
    """Make the folders, or make sure that what they hold was begun with the same inputs."""
    state = [_identity(file) for file in files]
    parts = [[(part.source, part.start, part.stop) for part in shard] for shard in plan]
    wanted = {
        "version": VERSION,
        "inputs": hashlib.sha256(json.dumps([state, parts]).encode()).hexdigest(),
        "tokenizer_sha256": sha256,
        "text_field": text_field,
        "holdout": holdout,
    }
    for split in splits:
        try:
            (output / split).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output / split}: cannot be made ({error.strerror})") from None
    path = output / PLAN
    if path.exists():
        try:
            begun = json.loads(path.read_text())
            other = [key for key, value in wanted.items() if begun[key] != value]
        except (ValueError, KeyError, TypeError):
            other = ["content"]
        if other:
            raise UserError(
                f"{path}: was begun with other {', '.join(other)} (repeat the first command, or "
                "choose another --output)"
            )
    elif any(any((output / split).glob("shard-*")) for split in splits):
        raise UserError(f"{output}: holds shards already (choose another --output)")
    for split in splits:
        for stray in (output / split).glob("*.tmp"):
            stray.unlink(missing_ok=True)
    write_atomically(path, json.dumps(wanted, indent=1).encode())


def _identity(file: str) -> list[Any]:
    if file.startswith(HUB):
        return [file]
    stat = Path(file).stat()
    return [file, stat.st_size, stat.st_mtime_ns]


@cache
def _encoder(folder: Path) -> DocumentEncoder:
    return DocumentEncoder(folder)


def encode_shard(job: ShardJob, progress: Progress) -> None:
    """Make the shard of each split: the work of one worker."""
    encoder = _encoder(job.output / "tokenizer")
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    job.output / split,
                    job.number,
                    vocab_size=encoder.vocab_size,
                    bos_id=encoder.bos_id,
                    eos_id=encoder.eos_id,
                    tokenizer_sha256=job.tokenizer_sha256,
                )
            )
            for split in job.splits
        }
        left = sum(part.num_bytes for part in job.parts)
        for texts in batches(t for part in job.parts for t in read_part(part, job.text_field)):
            documents, contents = encoder(texts), [text.encode() for text in texts]
            is_held_out = [job.holdout > 0 and _place(c) < job.holdout for c in contents]
            for split, writer in writers.items():
                here = [held == (split == "valid") for held in is_held_out]
                writer.add(
                    list(itertools.compress(documents, here)),
                    sum(map(len, itertools.compress(contents, here))),
                )
            num_bytes = min(left, sum(map(len, contents)))
            progress.add(len(texts), sum(map(len, documents)), num_bytes)
            left -= num_bytes
        progress.add(0, 0, left)  # what compressed or half empty parts were taken for


def _place(content: bytes) -> float:
    """A number in [0, 1) that a document has by its text alone."""
    return float(int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Group documents so that the tokenizer can use its threads, and memory stays small."""
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


def _finish(
    output: Path, splits: tuple[str, ...], num_shards: int, num_made: int, seconds: float
) -> str:
    """Write the indexes where they are missing; returns what there is now, in one line."""
    parts = []
    for split in splits:
        names = [f"{shard_name(number)}.json" for number in range(num_shards)]
        headers = [read_header(output / split / name) for name in names]
        documents = sum(header.num_documents for header in headers)
        if split == "train" and not documents:
            raise UserError(f"{output}: no training documents (add texts, or hold fewer out)")
        if not (output / split / INDEX).exists():
            write_index(output / split, num_shards)
        tokens = sum(header.num_tokens for header in headers)
        parts.append(f"{split} {documents:,} documents, {tokens:,} tokens")
    made = f"{num_made} shards in {tqdm.format_interval(seconds)}" if num_made else "nothing to do"
    kept = f", {num_shards - num_made} were there" if num_made < num_shards else ""
    return f"{output}: {'; '.join(parts)} ({made}{kept})"
