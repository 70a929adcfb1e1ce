"""RULER (Hsieh et al., COLM 2024, arXiv 2404.06654), offline: 11 tasks, 13 with QA files.

Instructions, numbers of needles, answer lengths and scoring are those of `VERSION`
(scripts/data/synthetic in that repository); docs/evaluation.md lists the differences.
"""

from pathlib import Path

from ..prompts import Encode, Task, fit_units
from ..text import Prose
from .answering import qa_task
from .counting import common_words_task, frequent_words_task
from .niah import niah_tasks
from .tracing import EXAMPLE_TOKENS, example_task, tracing_task

VERSION = "github.com/NVIDIA/RULER at c3f5e3b (July 2026)"


def ruler_tasks(length: int, prose: Prose, qa_files: list[Path], encode: Encode) -> list[Task]:
    """The tasks for `length` tokens, in RULER's order, with question answering for each file."""
    example_units = fit_units(example_task(), 0, EXAMPLE_TOKENS, encode)
    return [
        *niah_tasks(prose),
        tracing_task(example_units or example_task().least_units),
        common_words_task(length),
        frequent_words_task(length),
        *(qa_task(path) for path in qa_files),
    ]
