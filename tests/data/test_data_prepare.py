"""Preparing: equal bytes for any workers and after any kill; failures keep what is finished."""

import email
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tensorlm.data.inspect import length_histogram, lengths_figure
from tensorlm.data.prepare.encode import encode
from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import read_documents
from tensorlm.data.shards import Corpus, verify_shards
from tensorlm.data.tokenizer.tokenizers import load_tokenizer, tokenizer_sha256
from tensorlm.data.tokenizer.training import train_tokenizer
from tensorlm.runtime.errors import UserError
from tests.support.forked import run_forked
from tests.support.launching import ROOT, launch_environment

SOURCES = str(Path(email.__file__).parent / "*.py")
SHARD_BYTES = 20_000
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer of 400 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(read_documents(find_files([SOURCES]), "text"), 400, folder)
    return folder


@pytest.fixture(scope="module")
def expected(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker makes of the email package."""
    output = tmp_path_factory.mktemp("one") / "set"
    encode(find_files([SOURCES]), tokenizer, output, holdout=0.3, shard_bytes=SHARD_BYTES)
    return contents(output)


def contents(data: Path) -> dict[str, bytes]:
    """Every file of a data set."""
    files = (path for path in data.rglob("*") if path.is_file())
    return {str(path.relative_to(data)): path.read_bytes() for path in files}


def command(tokenizer: Path, output: Path, *more: str) -> list[str]:
    encode = [sys.executable, "launcher/prepare_data.py", "encode", "--input", SOURCES]
    options = ["--tokenizer", str(tokenizer), "--output", str(output), "--holdout", "0.3"]
    return [*encode, *options, "--shard-bytes", str(SHARD_BYTES), *more]


def run(arguments: list[str], code: int = 0) -> "subprocess.CompletedProcess[str]":
    result = subprocess.run(
        arguments, cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def llama3_tokenizer(folder: Path) -> Path:
    """A byte-level BPE in the form of Llama 3's."""
    model = Tokenizer(models.BPE(ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(read_documents(find_files([SOURCES]), "text"), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=special[0], eos_token=special[1]
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece file", "llama 3"])
def test_documents_decode_to_their_text_between_bos_and_eos(
    tmp_path: Path, tokenizer: Path, kind: str
) -> None:
    if kind == "llama 3":
        tokenizer = llama3_tokenizer(tmp_path / "llama3")
    elif kind == "sentencepiece file":
        tokenizer = tokenizer / "tokenizer.model"
    special = tmp_path / "special.txt"
    special.write_bytes("a </s> and <s>\r\n<|end_of_text|>, ünïcode  and 漢字\t\n".encode())
    files = find_files([SOURCES, str(special)])
    encode(files, tokenizer, tmp_path / "set")
    corpus, own = Corpus(tmp_path / "set/train"), load_tokenizer(tmp_path / "set/tokenizer")
    assert corpus.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    assert corpus.vocab_size == len(own)
    for text, ids in zip(read_documents(files, "text"), corpus.documents(), strict=True):
        assert ids[0] == own.bos_token_id
        assert ids[-1] == own.eos_token_id
        assert not {own.bos_token_id, own.eos_token_id} & set(ids[1:-1].tolist())
        assert own.decode(ids[1:-1]) == text
    assert sum(shard.header.num_bytes for shard in corpus.shards) == sum(
        Path(file).stat().st_size for file in files
    )


def test_two_processes_make_the_bytes_of_one(
    tmp_path: Path, tokenizer: Path, expected: dict[str, bytes]
) -> None:
    assert sum(name.startswith("train/") and ".tokens" in name for name in expected) > 8
    files, output = find_files([SOURCES]), tmp_path / "set"
    summary = encode(files, tokenizer, output, holdout=0.3, shard_bytes=SHARD_BYTES, workers=2)
    assert contents(output) == expected
    again = encode(files, tokenizer, output, holdout=0.3, shard_bytes=SHARD_BYTES)
    assert again.split(" (")[0] == summary.split(" (")[0]
    assert "nothing to do" in again
    assert contents(output) == expected


@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs Open MPI (the extra `mpi`)")
def test_two_mpi_ranks_make_the_bytes_of_one_worker(
    tmp_path: Path, tokenizer: Path, expected: dict[str, bytes]
) -> None:
    mpirun = ["mpirun", "-np", "2", "--oversubscribe", "--allow-run-as-root"]
    result = run([*mpirun, *command(tokenizer, tmp_path / "set")])
    assert result.stdout.count("documents,") == 2  # one summary, of train and valid
    assert "documents/s" in result.stderr
    assert contents(tmp_path / "set") == expected


def test_killed_it_goes_on_where_it_was(
    tmp_path: Path, tokenizer: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "set"
    with subprocess.Popen(
        command(tokenizer, output, "--workers", "2"), cwd=ROOT, env=launch_environment(),
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while len(list(output.glob("valid/shard-*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    finished = {
        path: path.stat().st_ino
        for path in output.glob("train/shard-*.json")
        if (output / "valid" / path.name).exists()
    }
    assert not (output / "train/index.json").exists()
    with pytest.raises(UserError, match="preparing did not finish"):
        Corpus(output / "train")
    # Its workers leave with it: nobody writes while the next one does.
    deadline = time.monotonic() + 60
    while _has_workers(output):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    summary = encode(find_files([SOURCES]), tokenizer, output, holdout=0.3, shard_bytes=SHARD_BYTES)
    assert "shards existed" in summary
    assert contents(output) == expected
    assert {path: path.stat().st_ino for path in finished} == finished


def _has_workers(output: Path) -> bool:
    """Whether a process has a file below `output` open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(output) in os.readlink(link):
                return True
        except OSError:
            continue
    return False


def test_full_disk_is_one_line_and_keeps_what_is_finished(
    tmp_path: Path, tokenizer: Path, expected: dict[str, bytes]
) -> None:
    sizes = sorted(len(c) for name, c in expected.items() if name.endswith(".tokens"))
    assert sizes[-1] > sizes[len(sizes) // 2] + 1000
    allowed = sizes[-1] - 1000  # of the system's file sizes: larger files cannot be written
    limited = ["prlimit", f"--fsize={allowed}", *command(tokenizer, tmp_path / "set")]
    errors = [line for line in run(limited, code=2).stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "cannot be written: File too large (make room and run the same command" in errors[0]
    assert not list(tmp_path.rglob("*.tmp"))
    kept = {name: c for name, c in contents(tmp_path / "set").items() if "shard-" in name}
    assert kept
    assert all(expected[name] == content for name, content in kept.items())
    files = find_files([SOURCES])
    encode(files, tokenizer, tmp_path / "set", holdout=0.3, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "set") == expected


def test_a_bad_record_stops_all_workers_with_one_line(tmp_path: Path, tokenizer: Path) -> None:
    lines = [json.dumps({"text": f"line {i} " * 50}) for i in range(300)]
    lines[170] = '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        encode(
            [str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "set", shard_bytes=4000, workers=2
        )
    (line,) = caught.value.problems
    assert "a.jsonl: byte " in line
    assert "field 'text' must be text" in line


@pytest.mark.parametrize("change", ["holdout", "inputs", "tokenizer", "text_field", "edited file"])
def test_an_output_begun_in_another_way_is_left_alone(
    tmp_path: Path, tokenizer: Path, change: str
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some text " * 100)
    files, output = [str(source)], tmp_path / "set"
    encode(files, tokenizer, output)
    before = contents(output)
    options: dict[str, float | str] = {}
    if change == "holdout":
        options["holdout"] = 0.5
    elif change == "text_field":
        options["text_field"] = "other"
    elif change == "inputs":
        files = find_files([SOURCES])
    elif change == "edited file":
        source.write_text("same size " * 100)
        os.utime(source, ns=(1, 1))
    else:
        tokenizer = shutil.copytree(tokenizer, tmp_path / "other")
        (tokenizer / "special_tokens_map.json").write_text("{}")
    with pytest.raises(UserError, match=r"was begun with other .* choose another --output"):
        encode(files, tokenizer, output, **options)  # type: ignore[arg-type]
    assert contents(output) == before


def test_histogram_counts_every_document_once() -> None:
    lengths = np.array([1, 2, 3, 4, 7, 8, 1023, 1024, 1 << 40])
    rows = length_histogram(lengths)
    assert rows[:4] == [(1, 2, 1, 1), (2, 4, 2, 5), (4, 8, 2, 11), (8, 16, 1, 8)]
    assert sum(documents for *_, documents, _ in rows) == len(lengths)
    assert sum(tokens for *_, tokens in rows) == lengths.sum()
    assert all(low * 2 == high for low, high, *_ in rows)


@pytest.mark.parametrize(
    ("lengths", "limits", "labels"),
    [
        ([600, 700, 9000], (600, 9001), ["1k", "2k", "4k", "8k"]),
        ([5, 2_500_000], (5, 2_500_001), ["8", "32", "128", "512", "2k", "8k", "32k", "128k",
                                          "512k", "2M"]),
        ([600, 900], (600, 901), ["600", "900"]),
        ([600], (600, 601), ["600"]),
        ([1, 1, 3], (1, 4), ["1", "2"]),
    ],
)  # fmt: skip
def test_plot_of_lengths_reaches_from_the_shortest_to_the_longest(
    lengths: list[int], limits: tuple[int, int], labels: list[str]
) -> None:
    figure = lengths_figure({"all": np.array(lengths), "some": np.array(lengths[:1])})
    (axes,) = figure.axes
    figure.canvas.draw()
    assert axes.get_xlim() == limits
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert [label.get_text() for label in axes.get_xticklabels(minor=True)] == []
    for split in axes.patches:  # every document is in a bin
        assert split.get_xy()[:, 1].max() > 0


def test_verify_and_inspect_describe_a_data_set(tmp_path: Path, data: Path) -> None:
    corpus = Corpus(data / "train")
    plot = tmp_path / "lengths.png"
    options = ["--seq-len", "4096", "--plot", str(plot)]
    shown = run_forked("prepare_data.py", "inspect", str(data), *options).stdout
    assert f"{len(corpus):,} documents, {corpus.num_tokens:,} tokens" in shown
    assert "document 0 (" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")

    copy = shutil.copytree(data, tmp_path / "copy")
    tokens = copy / "train/shard-00000.tokens"
    content = bytearray(tokens.read_bytes())
    content[1000] ^= 64
    tokens.write_bytes(content)
    failed = run_forked("prepare_data.py", "verify", str(copy))
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [
        f"error: {tokens}: checksum differs (restore the file, or prepare the data again)"
    ]
    assert verify_shards(copy / "valid") == []
