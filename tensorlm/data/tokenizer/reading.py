"""Read a tokenizer's files: the ids of `tokenizer.json`, and a check that `transformers` agrees."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from tensorlm.runtime.errors import UserError

from .files import read_files, tokenizer_files
from .hard_texts import file_ids, first_difference, hard_texts, transformers_ids


def read_tokenizer(folder: Path, named: Path) -> tuple[Tokenizer, Any]:
    """The tokenizer of a folder as its `tokenizer.json` is, and as `transformers` has it.

    Args:
        folder: of a tokenizer.
        named: what the user calls it, where `folder` is a copy.

    Raises:
        UserError: no tokenizer there, a damaged one, one without beginning- and end-of-text, one
            with an added token that the library moves to another id, or the two give other ids.
    """
    from transformers import PreTrainedTokenizerFast

    files = tokenizer_files(folder)
    try:
        form = json.loads(files["tokenizer.json"])
        reference = Tokenizer.from_buffer(files["tokenizer.json"])
        tokenizer = _read_by(PreTrainedTokenizerFast, files)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{named}: the tokenizer cannot be loaded ({reason})") from None
    reference.no_truncation()
    reference.no_padding()
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{named}: needs bos_token and eos_token in tokenizer_config.json")
    config = json.loads(files["tokenizer_config.json"])
    of_file = {token["content"]: token["id"] for token in form.get("added_tokens", [])}
    of_config = {
        token["content"]: int(index)
        for index, token in config.get("added_tokens_decoder", {}).items()
    }
    for name, tokens in (("tokenizer.json", of_file), ("tokenizer_config.json", of_config)):
        for content, index in tokens.items():
            if (found := tokenizer.convert_tokens_to_ids(content)) != index:
                raise UserError(
                    f"{named}: {name}: the id of the added token {content!r} must be {found}, "
                    f"where the tokenizers library puts it, got {index} (leave no gap before it)"
                )
    _check_equal(reference, tokenizer, named)
    return reference, tokenizer


def check_plain_reading(folder: Path, model_type: str, named: Path | None = None) -> None:
    """Make sure that plain `transformers` reads the ids of `tokenizer.json` in a model's folder.

    Args:
        folder: of a tokenizer.
        model_type: of the config.json that stands beside it: the class may depend on it.
        named: what the user calls `folder`.

    Raises:
        UserError: this version reads other ids, or cannot read the tokenizer.
    """
    from transformers import AutoTokenizer

    named = named or folder
    files = tokenizer_files(folder)
    model = {"config.json": json.dumps({"model_type": model_type}).encode()}
    try:
        tokenizer = _read_by(AutoTokenizer, files | model)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{named}: the tokenizer cannot be loaded ({reason})") from None
    _check_equal(Tokenizer.from_buffer(files["tokenizer.json"]), tokenizer, named)


@cache
def earlier_difference(folder: Path, _: str) -> str | None:
    """A text to which earlier versions gave other ids than those of `tokenizer.json`, if any.

    They let `AutoTokenizer` choose the class. The second argument is a hash of the files.
    """
    from transformers import AutoTokenizer

    reference = Tokenizer.from_buffer(tokenizer_files(folder)["tokenizer.json"])
    try:
        tokenizer = _read_by(AutoTokenizer, read_files(folder))
    except Exception:  # then no shards were encoded with it
        return None
    return _difference(reference, tokenizer)


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """A text that does not get the same ids from two tokenizers."""
    added = [token.content for token in one.get_added_tokens_decoder().values()]
    return first_difference(file_ids(one), file_ids(other), hard_texts(added))


def _read_by(kind: Any, files: dict[str, bytes]) -> Any:
    """Load from a folder that holds nothing else: no config or code beside it has a say."""
    from transformers.utils import logging

    with TemporaryDirectory(prefix="tensorlm-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # else a warning that `tensorlm` is not one of its models
        try:
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        finally:
            logging.set_verbosity(verbosity)


def _check_equal(reference: Tokenizer, tokenizer: Any, named: Path) -> None:
    if (text := _difference(reference, tokenizer)) is not None:
        import transformers

        raise UserError(
            f"{named}: the ids of tokenizer.json must be those that transformers "
            f"{transformers.__version__} reads, got others, for example for {text[:40]!r} "
            "(install a tested version of transformers)"
        )


def _difference(reference: Tokenizer, tokenizer: Any) -> str | None:
    """A text that does not get the same ids; tokens that `transformers` adds itself left out."""
    known = reference.get_vocab()
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    strange = [token for token in tokenizer.get_added_vocab() if token not in known]
    texts = [t for t in hard_texts(added) if not any(token in t for token in strange)]
    difference = first_difference(file_ids(reference), transformers_ids(tokenizer), texts)
    if difference is None:  # what the template puts around a text
        for text in texts[:8]:
            if reference.encode(text).ids != tokenizer(text)["input_ids"]:
                return text
    return difference
