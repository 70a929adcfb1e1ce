"""Converting a sentencepiece model to files that `transformers` reads, with the same ids.

The model's settings (whitespace, byte fallback, names and ids of special pieces) are translated,
and the result is compared with `SentencePieceProcessor.encode`. Models that cannot be converted
exactly are rejected: Unigram models, since sentencepiece sums their scores in 32 bits and in a long
document rounding decides between near-equal choices; and normalization tables, since transformers'
reader drops accents and sound marks.
"""

import json
from functools import cache
from typing import Any

import sentencepiece
from tokenizers import Tokenizer

from .hard_texts import PROBES, SPACE

_DIFFERS = "transformers would give other ids than sentencepiece"


@cache
def huggingface_files(content: bytes) -> dict[str, bytes]:
    """Make `tokenizer.json` and `tokenizer_config.json` for the model file `content`.

    Raises:
        ValueError: `transformers` would not give the same ids; the message has the reason.
    """
    from sentencepiece import sentencepiece_model_pb2 as definition

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        model = definition.ModelProto.FromString(content)
    except Exception as error:  # neither library documents its exceptions
        raise ValueError("it is not a sentencepiece model") from error
    if model.trainer_spec.model_type != definition.TrainerSpec.BPE:
        kind = definition.TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()
        raise ValueError(f"its type must be bpe, got {kind}: {_DIFFERS}")
    if model.normalizer_spec.precompiled_charsmap:
        raise ValueError(f"it normalizes text ({model.normalizer_spec.name}): {_DIFFERS}")
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ValueError("it has no piece for the beginning or the end of a text")
    form = _tokenizer_json(model, processor)
    text = json.dumps(form, ensure_ascii=False)
    _compare(Tokenizer.from_str(text), model, processor)
    special = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    if processor.pad_id() >= 0:
        special["pad"] = processor.pad_id()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": processor.id_to_piece(index) for name, index in special.items()},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
    }


def _tokenizer_json(model: Any, processor: Any) -> dict[str, Any]:
    """The content of tokenizer.json, written out so that it has the same bytes in all versions."""
    kinds = type(model.pieces[0])
    rules = model.normalizer_spec
    normalizers: list[dict[str, Any]] = []
    if rules.remove_extra_whitespaces:
        for pattern, content in ((r"\A +", ""), (rf"[ {SPACE}]+\z", ""), (" {2,}", " ")):
            normalizers.append(_replace({"Regex": pattern}, content))
    if rules.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": " "})
    spaces: dict[str, Any] | None = {
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False,
    }  # fmt: skip
    symbols = _symbols(model)
    if symbols:  # symbols are matched before `spaces` applies; a normalizer is slower
        normalizers.append(_replace({"String": " "}, SPACE))
        spaces = None
    bos = processor.id_to_piece(processor.bos_id())
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    decoders = [
        _replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": int(rules.add_dummy_prefix), "stop": 0},
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index, "content": piece.piece, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": index in symbols,
                "special": index not in symbols,
            }
            for index, piece in enumerate(model.pieces)
            if index in symbols or piece.type in (kinds.UNKNOWN, kinds.CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")],
            "special_tokens": {bos: {"id": bos, "ids": [processor.bos_id()], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }  # fmt: skip


def _symbols(model: Any) -> dict[int, str]:
    """User-defined symbols by id. One with a space never matches: spaces are replaced first."""
    symbol = type(model.pieces[0]).USER_DEFINED
    return {
        index: piece.piece
        for index, piece in enumerate(model.pieces)
        if piece.type == symbol and " " not in piece.piece
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _merges(model: Any) -> list[list[str]]:
    """All pairs of pieces that form a piece, best score first, the order of merging in both."""
    kinds = type(model.pieces[0])
    if any(piece.type == kinds.UNUSED for piece in model.pieces):
        raise ValueError(f"it has unused pieces: {_DIFFERS}")
    ids = {p.piece: i for i, p in enumerate(model.pieces) if p.type == kinds.NORMAL}
    merges = []
    for piece, index in ids.items():
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [
            (-model.pieces[index].score, index, ids[left], ids[right], left, right)
            for left, right in pairs
            if left in ids and right in ids
        ]
    merges.sort()
    pieces = {(score, index) for score, index, *_ in merges}
    if len({score for score, _ in pieces}) < len(pieces):
        raise ValueError(f"it has pieces with equal scores: {_DIFFERS}")
    return [[left, right] for *_, left, right in merges]


def _compare(ours: Tokenizer, model: Any, processor: Any) -> None:
    kinds = type(model.pieces[0])
    pieces = [p.piece.replace(SPACE, " ") for p in model.pieces if p.type == kinds.NORMAL]
    symbols = [symbol.replace(SPACE, " ") for symbol in _symbols(model).values()]
    texts = [*PROBES, *pieces, *(text for s in symbols for text in (s, f" {s}x{s}{s} y {s} "))]
    ours.encode_special_tokens = True
    encodings = ours.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding, ids in zip(texts, encodings, processor.encode(texts), strict=True):
        if encoding.ids != ids:
            raise ValueError(f"{_DIFFERS}, for example for {text[:40]!r}")
