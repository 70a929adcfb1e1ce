"""The base of all sections of the configuration."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict

ModelT = TypeVar("ModelT", bound=BaseModel)


class Section(BaseModel):
    """Base of all sections: strict types, finite numbers, no unknown keys, frozen.

    The string below a setting is its description in docs/configuration.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False,
        use_attribute_docstrings=True,
    )  # fmt: skip


def raise_all(model: ModelT, problems: list[str]) -> ModelT:
    """Return the model, or raise one ValueError with a line per problem (for validators)."""
    if problems:
        raise ValueError("\n".join(problems))
    return model
