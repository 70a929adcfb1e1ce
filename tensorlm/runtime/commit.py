"""The commit that runs."""

import subprocess
from pathlib import Path


def git_commit() -> str:
    """Commit of the checkout that this code runs from, `-dirty` with changes; else `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
