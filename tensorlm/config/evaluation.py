"""The `[eval]` section of the configuration."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tensorlm.runtime.errors import UserError

from .section import Section, raise_all

WINDOW_TASKS = ("ppl", "recall")  # passes over windows, which ranks may share
GENERATION_TASKS = ("passkey", "niah", "ruler")
RULER_TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
_BATCH_TOKENS = 32768


def windows_at_once(span: int, length: int) -> int:
    """Number of windows of `length` tokens, cut from spans of `span`, in one forward pass."""
    return max(1, min(span, _BATCH_TOKENS) // length)


class EvalConfig(Section):
    """What an evaluation measures, in training (`every`) and by launcher/evaluate.py."""

    every: NonNegativeInt = 0
    """training steps between evaluations (0: none)"""
    tasks: tuple[Literal["ppl", "recall", "passkey", "niah", "ruler"], ...] = Field(
        ("ppl",), strict=False
    )
    """what to measure: perplexity, recall of the choice of routed layers, passkey, needles,
    RULER"""
    lengths: tuple[int, ...] = Field((), strict=False)
    """context lengths in tokens (default: data.seq_len)"""
    seed: NonNegativeInt = 0
    """seed of the prompts and of the bootstrap"""
    text: str = ""
    """glob of held-out text files (default: the data set's valid split)"""
    text_field: str = "text"
    """field that contains the text, if `text` names JSON or table files"""
    max_tokens: PositiveInt = 1 << 20
    """maximum number of held-out tokens to predict"""
    segment: NonNegativeInt = 0
    """tokens in the spans that all lengths predict (0: the longest length)"""
    slide: int = Field(2, ge=1)
    """sliding windows move by length / slide tokens (1: no sliding windows)"""
    near: NonNegativeInt = 4096
    """short context, in tokens, for the gain from long context (at least 4; 0: the gain is not
    measured)"""
    recall_windows: int = Field(8, ge=1)
    """held-out windows of each length in which recall is measured"""
    recall_queries: int = Field(512, ge=1)
    """last tokens of each window whose choice is measured"""
    depths: int = Field(11, ge=1)
    """number of needle depths in the heat maps, from 0 to 100 %"""
    repeats: int = Field(5, ge=1)
    """prompts per cell of the heat maps"""
    samples: int = Field(100, ge=1)
    """prompts per RULER task and length"""
    ruler: tuple[str, ...] = Field((), strict=False)
    """RULER tasks to run (default: all whose files are available)"""
    qa: tuple[str, ...] = Field((), strict=False)
    """SQuAD or HotpotQA JSON files, which RULER's qa_1 and qa_2 need"""
    prefill_chunk: PositiveInt = 65536
    """prompt tokens per forward pass"""

    def span_length(self, lengths: Sequence[int]) -> int:
        """Length in tokens of the spans that windows of all these lengths predict.

        Raises:
            UserError: `segment` is not a multiple of each length.
        """
        longest = self.segment or max(lengths)
        for length in lengths:
            if longest % length:
                raise UserError(
                    f"eval.segment: must be a multiple of length {length}, got {longest}"
                )
        return longest

    @model_validator(mode="after")
    def _names_and_lengths(self) -> "EvalConfig":
        problems = [f"lengths: must be at least 2, got {n}" for n in self.lengths if n < 2]
        longest = self.segment or max(self.lengths, default=0)
        whole = "segment" if self.segment else "the longest length"
        problems += [
            f"lengths: must divide {whole} = {longest}, got {n} (all lengths predict the same "
            "tokens)"
            for n in self.lengths
            if "ppl" in self.tasks and n >= 2 and longest % n
        ]
        if 0 < self.near < 4:
            problems.append(f"near: must be at least 4, or 0 (not measured), got {self.near}")
        for name in set(self.ruler) - set(RULER_TASKS):
            problems.append(f"ruler: must be one of {', '.join(RULER_TASKS)}, got {name}")
        if not self.qa and any(name.startswith("qa_") for name in self.ruler):
            problems.append("ruler: qa_1 and qa_2 need data files (set eval.qa)")
        return raise_all(self, problems)
