"""Reading a tokenizer's files, and checking that `transformers` gives the same ids."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from tensorlm.runtime.errors import UserError, first_line

from .files import read_files, tokenizer_files
from .hard_texts import file_ids, first_difference, hard_texts, transformers_ids


def read_tokenizer(folder: Path, named: Path) -> tuple[Tokenizer, Any]:
    """Read a folder's tokenizer from its `tokenizer.json`, and with `transformers`.

    Args:
        folder: folder of the tokenizer.
        named: the user's name for it, if `folder` is a copy.

    Raises:
        UserError: there is no tokenizer, it is damaged, it lacks beginning- or end-of-text, the
            library moves one of its added tokens to another id, or the two readings give different
            ids.
    """
    from transformers import PreTrainedTokenizerFast

    files = tokenizer_files(folder)
    try:
        form = json.loads(files["tokenizer.json"])
        reference = Tokenizer.from_buffer(files["tokenizer.json"])
        tokenizer = _read_by(PreTrainedTokenizerFast, files)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise UserError(f"{named}: the tokenizer cannot be loaded ({first_line(error)})") from None
    reference.no_truncation()
    reference.no_padding()
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{named}: tokenizer_config.json must name bos_token and eos_token")
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
    """Check that plain `transformers` gives the ids of `tokenizer.json` in a model's folder.

    Args:
        folder: folder of the tokenizer.
        model_type: model type in the folder's config.json, on which the class may depend.
        named: the user's name for `folder`.

    Raises:
        UserError: this version gives other ids, or cannot read the tokenizer.
    """
    from transformers import AutoTokenizer

    named = named or folder
    files = tokenizer_files(folder)
    model = {"config.json": json.dumps({"model_type": model_type}).encode()}
    try:
        tokenizer = _read_by(AutoTokenizer, files | model)
    except Exception as error:
        raise UserError(f"{named}: the tokenizer cannot be loaded ({first_line(error)})") from None
    _check_equal(Tokenizer.from_buffer(files["tokenizer.json"]), tokenizer, named)


@cache
def earlier_difference(folder: Path, _: str) -> str | None:
    """A text for which earlier versions gave other ids than `tokenizer.json`, if any.

    Those versions let `AutoTokenizer` choose the class. The second argument is a hash of the files.
    """
    from transformers import AutoTokenizer

    reference = Tokenizer.from_buffer(tokenizer_files(folder)["tokenizer.json"])
    try:
        tokenizer = _read_by(AutoTokenizer, read_files(folder))
    except Exception:  # no shards can have been encoded with it
        return None
    return _difference(reference, tokenizer)


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """A text for which two tokenizers give different ids, or None."""
    added = [token.content for token in one.get_added_tokens_decoder().values()]
    return first_difference(file_ids(one), file_ids(other), hard_texts(added))


def _read_by(kind: Any, files: dict[str, bytes]) -> Any:
    """Load from a folder with only these files, so that no other config or code has an effect."""
    from transformers.utils import logging

    with TemporaryDirectory(prefix="tensorlm-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # suppress a warning that `tensorlm` is an unknown model
        try:
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        finally:
            logging.set_verbosity(verbosity)


def _check_equal(reference: Tokenizer, tokenizer: Any, named: Path) -> None:
    if (text := _difference(reference, tokenizer)) is not None:
        import transformers

        raise UserError(
            f"{named}: transformers {transformers.__version__} must give the ids of "
            f"tokenizer.json, got others, for example for {text[:40]!r} (install a tested version "
            "of transformers)"
        )


def _difference(reference: Tokenizer, tokenizer: Any) -> str | None:
    """A text with different ids, or None; ignores tokens that `transformers` itself adds."""
    known = reference.get_vocab()
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    strange = [token for token in tokenizer.get_added_vocab() if token not in known]
    texts = [t for t in hard_texts(added) if not any(token in t for token in strange)]
    difference = first_difference(file_ids(reference), transformers_ids(tokenizer), texts)
    if difference is None:  # compare the tokens that templates put around a text
        for text in texts[:8]:
            if reference.encode(text).ids != tokenizer(text)["input_ids"]:
                return text
    return difference
