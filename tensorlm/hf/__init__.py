"""Hugging Face: export checkpoints, import weights, and the code that exported folders carry."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attached import attach

__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    """Import `attach` on first use: it takes seconds, for transformers' model classes.

    Conversion and the evaluation of checkpoints do without them.
    """
    if name == "attach":
        from .attached import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
