"""Texts for comparing two readings of one tokenizer, and the comparison.

Different readings differ in rules: word boundaries, spaces and line ends, characters without a
piece. So a few texts suffice, if they cover all combinations of such characters.
"""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

from tokenizers import Tokenizer

SPACE = "\u2581"
# Texts that give other ids if a translation is not exact; a model's own pieces are added.
PROBES = (
    "", " ", "  ", "lead", " lead", "  lead", "trail ", "trail  ", "a  b   c",
    "\n", "\n\n\n", "\t\t", " \n ", "a\tb\r\nc\n", "\r", "\x00\x01\x1b\x7f",
    f"{SPACE}a {SPACE} b{SPACE}", "3.14 0123456789", "<s>a</s> <unk> <0x0A><pad>",
    "ünï\u00a0code e\u0301 e\u0302\u0301", "漢字\u3000カタ ｶﾞ ｆｕｌｌ", "한국어 ﬁ ² ½ ™",
    "😀 👩\u200d👩\u200d👧 🇫🇷", "\ufeff\u200b\u2028 \ud7ff\uffff\U0010ffff",
    "a" * 99, " " * 99, "ab" * 50, "\n" * 70, "def f(x):\n    return {x: 'y'}\n",
)  # fmt: skip
_SENTENCES = (
    "One sentence ends.\n\nThe next  begins; it isn't LONG, we've 1,234,567.89 of THEM!\r\n\r\n",
    "for (int i=0; i<10; ++i) {\n\t\tx[i] += 0x1F;  // don't\n}\n\n\n    return;\n",
    "https://a.example/b?c=d&e=f%20g#h __init__ snake_case camelCase HTTPServer v2.0-rc1",
    "Ça va? Où est-ce — «là»… naïve, Straße, ÅNGSTRÖM, ΑΒΓ αβγ, Русский текст, שלום, مرحبا, नमस्ते",
    "Do not say \u201chello\u201d . , ? ! ' n't 'll 're 'S 'LL",
)
_CHARACTERS = ("a", "B", "t", "7", " ", "\n", "\r", "\t", ".", "'", "_", "é", "漢", "😀", SPACE)
_MAX_TOKENS = 512  # maximum number of added tokens to test

Ids = Callable[[list[str], bool], list[list[int]]]


def hard_texts(added: Iterable[str] = ()) -> list[str]:
    """The texts, including some with the `added` tokens among other characters."""
    tokens = list(added)[:_MAX_TOKENS]
    around = [text for t in tokens for text in (t, f"a{t}b", f" {t} x {t}{t}\n{t}\n y {t} ")]
    starts = ["".join(pair) for pair in product(_CHARACTERS, repeat=2)]
    triples = ["".join(a + b + c for b, c in product(_CHARACTERS, repeat=2)) for a in _CHARACTERS]
    return [*PROBES, *_SENTENCES, *around, *starts, *triples]


def file_ids(tokenizer: Tokenizer) -> Ids:
    """A function that returns the ids of a `tokenizer.json`.

    Its arguments are the texts, and whether special tokens are encoded as plain text.
    """

    def ids(texts: list[str], as_text: bool) -> list[list[int]]:
        before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, as_text
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        tokenizer.encode_special_tokens = before
        return [encoding.ids for encoding in encodings]

    return ids


def transformers_ids(tokenizer: Any) -> Ids:
    """A function that returns the ids of a `transformers` tokenizer, like `file_ids`."""

    def ids(texts: list[str], as_text: bool) -> list[list[int]]:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=as_text,
            return_attention_mask=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    return ids


def first_difference(wanted: Ids, found: Ids, texts: list[str]) -> str | None:
    """The first text with different ids, in repeated calls with and without special tokens."""
    for as_text in (True, False):
        answers = (wanted(texts, as_text), found(texts, as_text), wanted(texts, as_text))
        for text, *ids in zip(texts, *answers, strict=True):
            if any(other != ids[0] for other in ids[1:]):
                return text
    return None
