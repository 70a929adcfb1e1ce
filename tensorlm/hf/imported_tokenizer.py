"""Whether imported weights have the tokenizer with which the data was encoded."""

from pathlib import Path

from tensorlm.data.tokenizer.files import has_tokenizer
from tensorlm.data.tokenizer.tokenizers import compare_tokenizers, tokenizer_sha256
from tensorlm.runtime.errors import UserError


def is_same_tokenizer(imported: Path, tokenizer: Path) -> bool:
    """Whether the imported folder has this tokenizer."""
    return has_tokenizer(imported) and tokenizer_sha256(imported) == tokenizer_sha256(tokenizer)


def describe_another_tokenizer(imported: Path | None, tokenizer: Path, data: str) -> str | None:
    """A note if the weights have another tokenizer than the data; None otherwise.

    Args:
        imported: the run's imported folder, or the folder to import.
        tokenizer: folder of the data's tokenizer.
        data: the user's name for the data.
    """
    if imported is None or not has_tokenizer(imported) or not has_tokenizer(tokenizer):
        return None
    try:
        difference = compare_tokenizers(imported, tokenizer)
    except UserError as error:
        difference = f"they cannot be compared ({error.problems[0]})"
    if difference is None:
        return None
    return (
        f"note: {data} was encoded with another tokenizer than that of {imported}, the source of "
        f"the weights: {difference}"
    )
