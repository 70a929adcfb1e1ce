"""The rooms of tensorlm as its imports show them, and the picture in docs/architecture.md.

`python -m tests.support.rooms` draws the picture again.
"""

import ast
from pathlib import Path

from tests.support.launching import ROOT

PACKAGE = ROOT / "tensorlm"
PAGE = ROOT / "docs/architecture.md"
# From the ground up: each room imports from floors below its own, rooms of one floor do not know
# one another.
FLOORS = [
    ["runtime"],
    ["config"],
    ["batch"],
    ["data", "model", "checkpoint"],
    ["hf", "plan"],
    ["evaluation"],
    ["train"],
    ["benchmarks"],
    ["commands"],
]
_BEGIN, _END = "```mermaid\nflowchart TD\n", "```\n"


def room_of(path: Path) -> str:
    """The room that a module of tensorlm belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    """The rooms of tensorlm that one of its modules imports, also inside functions."""
    package = ("tensorlm", *path.relative_to(PACKAGE).parts[:-1])
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "tensorlm" and len(part) > 1}


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports), for all rooms."""
    known = {room for floor in FLOORS for room in floor}
    return {
        (room_of(path), other)
        for path in PACKAGE.rglob("*.py")
        for other in rooms_imported(path)
        if room_of(path) in known and other in known and room_of(path) != other
    }


def picture() -> str:
    """The rooms as a Mermaid flowchart: a floor a row, an arrow from a room to what it imports.

    An arrow that longer ways imply is left out.
    """
    direct = arrows()

    def reaches(start: str, goal: str) -> bool:
        nexts = {b for a, b in direct if a == start}
        return goal in nexts or any(reaches(room, goal) for room in nexts)

    drawn = sorted(
        (a, b)
        for a, b in direct
        if not any(reaches(room, b) for room in {c for d, c in direct if d == a} - {b})
    )
    lines = []
    for number, floor in reversed(list(enumerate(FLOORS))):
        lines.append(f'  subgraph floor{number}[" "]')
        lines += [f"    {room}" for room in floor]
        lines.append("  end")
    lines += [f"  {a} --> {b}" for a, b in drawn]
    return _BEGIN + "\n".join(lines) + "\n" + _END


def drawn_picture() -> str:
    """The picture that the page has now."""
    text = PAGE.read_text()
    begin = text.index(_BEGIN)
    return text[begin : text.index(_END, begin + len(_BEGIN)) + len(_END)]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().replace(drawn_picture(), picture()))
