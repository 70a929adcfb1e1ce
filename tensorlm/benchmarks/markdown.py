"""Lines of Markdown tables."""

from collections.abc import Sequence


def table_row(cells: Sequence[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def table_head(cells: Sequence[str]) -> str:
    """The header of a table and the line below it."""
    return f"{table_row(cells)}\n{table_row(['---'] * len(cells))}"
