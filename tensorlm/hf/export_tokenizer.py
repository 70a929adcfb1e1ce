"""The tokenizer of an exported folder: its files, its chat template, and how prompts begin."""

from pathlib import Path
from typing import Any

from tensorlm.data.tokenizer.chat_templates import chat_template_files, copy_chat_templates
from tensorlm.data.tokenizer.reading import check_plain_reading, read_tokenizer
from tensorlm.data.tokenizer.tokenizers import copy_tokenizer

from .imported_tokenizer import is_same_tokenizer


def write_tokenizer(source: Path, folder: Path, imported: Path | None, model_type: str) -> Any:
    """Copy a tokenizer into an exported folder, and make sure that `transformers` reads its ids.

    A tokenizer without a chat template gets that of the imported folder if it is the same one.

    Args:
        source: folder of the tokenizer.
        folder: where the export is made, without config.json yet.
        imported: what the run's import left.
        model_type: of the config.json to come.

    Returns:
        The tokenizer, loaded from `folder`.

    Raises:
        UserError: no tokenizer there, or a bad one.
    """
    copy_tokenizer(source, folder)
    if imported and not chat_template_files(source) and is_same_tokenizer(imported, source):
        copy_chat_templates(imported, folder)
    check_plain_reading(folder, model_type, named=source)
    return read_tokenizer(folder, source)[1]


def describe_prompts(folder: Path) -> str | None:
    """What to do so that prompts begin as documents did in training, if anything."""
    reference, tokenizer = read_tokenizer(folder, folder)
    text = reference.encode("a", add_special_tokens=False).ids
    prompt = reference.encode("a").ids
    if prompt == [tokenizer.bos_token_id, *text]:
        return None
    bos = tokenizer.bos_token
    if prompt == text:
        return (
            f"the tokenizer adds no BOS; every document began with it in training: begin each "
            f"prompt with {bos} (lm-eval: add_bos_token=True)"
        )
    return (
        f"the tokenizer turns a prompt into {reference.encode('a').tokens}; in training documents "
        f"began with BOS alone: encode prompts with add_special_tokens=False and {bos} in front"
    )
