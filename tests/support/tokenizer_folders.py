"""Small tokenizers in the forms in which real ones are published, each a `tokenizer.json`."""

import email
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SOURCES = [str(path) for path in sorted(Path(email.__file__).parent.glob("*.py"))]
WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The headers.\n\nThe  next part isn't LONG: 12345 items!\r\n\r\n",
    " leading space",
    "   three spaces\tand a tab\n\n\n    return None\n",
    "漢字 ünïcode 😀 </s> <s>",
    "",
]


@cache
def byte_level() -> str:
    """As Llama 3's kind: words are split by a regular expression, bytes are the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(SOURCES, trainer)
    return tokenizer.to_str()


@cache
def like_llama2() -> str:
    """As Llama 2's kind: a mark in front of the text and for each space, bytes where needed."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # to train alone
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=pieces, show_progress=False)
    tokenizer.train(SOURCES, trainer)
    form = json.loads(tokenizer.to_str())
    form["pre_tokenizer"] = None
    form["added_tokens"] = [token for token in form["added_tokens"] if token["id"] < 3]
    return json.dumps(form)


def write_folder(folder: Path, form: str | dict[str, Any], **config: Any) -> Path:
    """A folder of `tokenizer.json`, and of a config with `bos_token` and `eos_token`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = form if isinstance(form, str) else json.dumps(form)
    (folder / "tokenizer.json").write_text(content)
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(ends | config))
    return folder


def added_token(content: str, index: int, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    fields = ("single_word", "lstrip", "rstrip", "normalized")
    return {
        "id": index,
        "content": content,
        **dict.fromkeys(fields, False),
        "special": True,
    } | flags


def ids_of_file(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids that `tokenizer.json` gives, special tokens in the text taken as text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
