"""The tokenizer of an exported folder: files, chat templates, and the beginning of prompts."""

from pathlib import Path
from typing import Any

from tensorlm.data.tokenizer.chat_templates import chat_template_files, copy_chat_templates
from tensorlm.data.tokenizer.reading import check_plain_reading, read_tokenizer
from tensorlm.data.tokenizer.tokenizers import copy_tokenizer

from .imported_tokenizer import is_same_tokenizer


def write_tokenizer(source: Path, folder: Path, imported: Path | None, model_type: str) -> Any:
    """Copy a tokenizer to an exported folder, and check that `transformers` gives its ids.

    A tokenizer without a chat template gets that of the imported folder, if its tokenizer is the
    same.

    Args:
        source: folder of the tokenizer.
        folder: the exported folder, which has no config.json yet.
        imported: the run's imported folder, or None.
        model_type: model type of the future config.json.

    Returns:
        The tokenizer, loaded from `folder`.

    Raises:
        UserError: there is no tokenizer, or it is invalid.
    """
    copy_tokenizer(source, folder)
    if imported and not chat_template_files(source) and is_same_tokenizer(imported, source):
        copy_chat_templates(imported, folder)
    check_plain_reading(folder, model_type, named=source)
    return read_tokenizer(folder, source)[1]


def describe_prompts(folder: Path) -> str | None:
    """Instructions for prompts to begin like documents in training, or None if not needed."""
    reference, tokenizer = read_tokenizer(folder, folder)
    text = reference.encode("a", add_special_tokens=False).ids
    prompt = reference.encode("a").ids
    if prompt == [tokenizer.bos_token_id, *text]:
        return None
    bos = tokenizer.bos_token
    if prompt == text:
        return (
            "the tokenizer does not add BOS, but every document in training began with it; begin "
            f"each prompt with {bos} (lm-eval: add_bos_token=True)"
        )
    return (
        f"the tokenizer turns a prompt into {reference.encode('a').tokens}, but documents in "
        f"training began with only BOS; encode {bos} + prompt with add_special_tokens=False"
    )
