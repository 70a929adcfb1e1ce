"""Hugging Face: exporting checkpoints, importing weights, and the code inside exported folders."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attached import attach

__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    """Import `attach` on first use: transformers' model classes take seconds to import.

    Conversion and the evaluation of checkpoints do not need them.
    """
    if name == "attach":
        from .attached import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
