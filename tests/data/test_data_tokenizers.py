"""Tokenizers: a sentencepiece model's own ids, in plain `transformers` too, or one line why not."""

import email
import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import read_documents
from tensorlm.data.tokenizer.tokenizers import (
    DocumentEncoder,
    check_tokenizer,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_sha256,
)
from tensorlm.data.tokenizer.training import cut_line, train_tokenizer
from tensorlm.runtime.errors import UserError

SOURCES = str(Path(email.__file__).parent / "*.py")
IDENTITY = {"normalization_rule_name": "identity"}
LLAMA = {
    **IDENTITY,
    "byte_fallback": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
SYMBOLS = {"user_defined_symbols": ["<sep>", "\n\n", "▁▁", "▁▁▁▁", "   ", "a.b|c"]}
KINDS: dict[str, dict[str, Any]] = {
    "like llama": LLAMA,
    "no dummy prefix": {**LLAMA, "add_dummy_prefix": False},
    "no byte fallback": {**LLAMA, "byte_fallback": False},
    "no extra whitespace": IDENTITY,
    "pieces across words": {**LLAMA, "split_by_whitespace": False},
    "other names": {**LLAMA, "bos_piece": "<begin>", "eos_piece": "<end>", "unk_piece": "<what>"},
    "other ids": {**LLAMA, "pad_id": 0, "unk_id": 3, "bos_id": 5, "eos_id": 7},
    "own symbols": {**LLAMA, **SYMBOLS, "add_dummy_prefix": False},
    "control symbols": {**LLAMA, "control_symbols": ["<control>"]},
}
DIFFERS = "transformers would give other ids than sentencepiece"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": (
        {**LLAMA, "model_type": "unigram"},
        f"its type must be bpe, got unigram: {DIFFERS}",
    ),
    "characters": ({**LLAMA, "model_type": "char"}, f"its type must be bpe, got char: {DIFFERS}"),
    "normalization": ({}, f"it normalizes text (nmt_nfkc): {DIFFERS}"),
    "no beginning": (
        {**LLAMA, "bos_id": -1},
        "it has no piece for the beginning or the end of a text",
    ),
    "symbols after a space": ({**LLAMA, **SYMBOLS}, f"{DIFFERS}, for example for "),
    "space behind": (
        {**LLAMA, "treat_whitespace_as_suffix": True},
        f"{DIFFERS}, for example for 'lead'",
    ),
}


def train(path: Path, options: dict[str, Any]) -> Any:
    """Write a sentencepiece model of the email package; returns its processor."""
    texts = read_documents(find_files([SOURCES]), "text")
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=file, hard_vocab_limit=False, minloglevel=2, num_threads=1,
            **{"model_type": "bpe", "vocab_size": 500, **options},
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def texts_like(processor: Any) -> list[str]:
    """Real texts, and random ones of the model's pieces and of what it never saw."""
    random_texts = random.Random(0)
    pieces = [
        processor.id_to_piece(i)
        for i in range(processor.get_piece_size())
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    ]
    odd = [
        *" \n\t\r\x00\x1b▁é漢ｶ😀\u200d\u0301",
        "  ",
        "    ",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<pad>",
    ]
    parts = pieces + odd * (len(pieces) // len(odd))
    made = (
        "".join(random_texts.choices(parts, k=random_texts.randint(1, 40))) for _ in range(1000)
    )
    return ["", " lead", "lead", "trail ", *read_documents(find_files([SOURCES]), "text"), *made]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_get_the_ids_of_the_sentencepiece_model(tmp_path: Path, kind: str) -> None:
    model = tmp_path / "any name.model"
    processor = train(model, KINDS[kind])
    copy_tokenizer(model, tmp_path / "copy")
    assert tokenizer_sha256(tmp_path / "copy") == tokenizer_sha256(model)
    encoder = DocumentEncoder(tmp_path / "copy")
    bos, eos = processor.bos_id(), processor.eos_id()
    assert (encoder.bos_id, encoder.eos_id) == (bos, eos)
    assert encoder.vocab_size == processor.get_piece_size()
    texts = texts_like(processor)
    wanted = [[bos, *ids, eos] for ids in processor.encode(texts)]
    assert [ids.tolist() for ids in encoder(texts)] == wanted

    # The same ids without this program; there, special tokens in the text are special.
    plain = AutoTokenizer.from_pretrained(tmp_path / "copy")
    names = [processor.id_to_piece(i) for i in (bos, eos, processor.unk_id())]
    for text, ids in zip(texts, wanted, strict=True):
        if not any(name in text for name in [*names, "<pad>", "<control>"]):
            assert plain.encode(text) == ids[:-1]
            if KINDS[kind].get("byte_fallback"):
                assert plain.decode(ids[1:-1]) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_ids_would_differ_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    options, reason = REFUSED[kind]
    train(tmp_path / "a.model", options)
    with pytest.raises(UserError) as caught:
        copy_tokenizer(tmp_path / "a.model", tmp_path / "copy")
    (line,) = caught.value.problems
    assert line.startswith(f"{tmp_path / 'a.model'}: cannot be used: {reason}")
    assert line.endswith("or pass a Hugging Face folder with a tokenizer.json)")
    assert not (tmp_path / "copy").exists()


def test_pieces_of_equal_score_and_other_files_are_refused(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as definition

    train(tmp_path / "a.model", LLAMA)
    model = definition.ModelProto.FromString((tmp_path / "a.model").read_bytes())
    model.pieces[300].score = model.pieces[301].score
    (tmp_path / "equal.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="it has pieces with equal scores"):
        tokenizer_sha256(tmp_path / "equal.model")
    (tmp_path / "other.model").write_bytes(b"IQ== 0\nIg== 1\n")  # such is Llama 3's
    with pytest.raises(UserError, match="not a sentencepiece model"):
        tokenizer_sha256(tmp_path / "other.model")


def test_our_own_tokenizer_keeps_every_space(tmp_path: Path) -> None:
    train_tokenizer(read_documents(find_files([SOURCES]), "text"), 400, tmp_path / "own")
    encoder, tokenizer = DocumentEncoder(tmp_path / "own"), load_tokenizer(tmp_path / "own")
    texts = ["lead", " lead", "  lead", "\n lead ", " "]
    documents = encoder(texts)
    assert len({ids.tobytes() for ids in documents}) == len(texts)
    assert [tokenizer.decode(ids[1:-1]) for ids in documents] == texts


@pytest.mark.parametrize(
    ("texts", "vocab_size", "words"),
    [
        (["a few words"] * 9, 5000, r"vocab-size: must be at most (\d+) for these texts, got 5000"),
        (["a few words"] * 9, 260, r"vocab-size: must be at least (\d+) for .* texts, got 260"),
        ([], 300, "input: must contain text to train on"),
        (["\n\n", ""], 300, "input: must contain text to train on"),
    ],
)
def test_a_vocabulary_that_does_not_fit_says_which_would(
    tmp_path: Path, texts: list[str], vocab_size: int, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        train_tokenizer(texts, vocab_size, tmp_path / "tokenizer")
    found = re.search(f"^--{words}", str(caught.value))
    assert found
    assert "src/" not in str(caught.value)
    if found.groups():
        train_tokenizer(texts, int(found[1]), tmp_path / "tokenizer")
        assert len(load_tokenizer(tmp_path / "tokenizer")) == int(found[1])


def test_long_lines_are_trained_on_too(tmp_path: Path) -> None:
    words = random.Random(0).choices(["日本語の", "文章です。", "長い", "漢字、"], k=2000)
    text = "".join(words)  # one line, 20 kB, no space
    train_tokenizer([text], 300, tmp_path / "tokenizer")
    (ids,) = DocumentEncoder(tmp_path / "tokenizer")([text])
    assert len(ids) < len(text)
    assert load_tokenizer(tmp_path / "tokenizer").decode(ids[1:-1]) == text


@pytest.mark.parametrize("characters", ["ab c", "語é x", "漢字", "😀é", " "])
def test_pieces_of_a_long_line_are_short_and_make_it_up(characters: str) -> None:
    for seed in range(20):
        line = "".join(random.Random(seed).choices(characters, k=6000))
        pieces = list(cut_line(line))
        assert "".join(pieces) == line
        assert max(len(piece.encode()) for piece in pieces) <= 4192
        assert len(pieces) <= len(line.encode()) // 4000 + 1
        if " " in characters:
            assert all(piece.endswith(" ") for piece in pieces[:-1])
    assert list(cut_line("x" * 4192)) == ["x" * 4192]
    assert list(cut_line("")) == []


def test_a_tokenizer_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    train(tmp_path / "a.model", LLAMA)
    copy_tokenizer(tmp_path / "a.model", tmp_path / "copy")
    sha256 = tokenizer_sha256(tmp_path / "copy")
    check_tokenizer(tmp_path / "copy", sha256)
    (tmp_path / "copy/special_tokens_map.json").write_text("{}")
    with pytest.raises(UserError, match=r"copy: must be the tokenizer .* \(restore its files"):
        check_tokenizer(tmp_path / "copy", sha256)
    copy_tokenizer(tmp_path / "a.model", tmp_path / "copy")
    check_tokenizer(tmp_path / "copy", sha256)
