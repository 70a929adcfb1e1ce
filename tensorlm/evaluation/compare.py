"""Joining the reports of several evaluations, from their report.json files."""

from pathlib import Path

from tensorlm.runtime.errors import UserError

from .output import check_output
from .report import format_report, write_reports
from .results import Report, merge_reports, read_report


def compare_reports(folders: list[Path], output: Path) -> str:
    """Join the reports below `folders`, and write the joint report to `output`.

    An earlier joint report in `output` is never one of the parts.

    Returns:
        All tables and notes, as text.

    Raises:
        UserError: `output` cannot be written or contains one of the parts, there is no report, or
            a report is damaged.
    """
    check_output(output)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--compare: must be folders, got {folder}")
    files = {
        file.resolve(): None for folder in folders for file in sorted(folder.rglob("report.json"))
    }
    parts: list[Report] = []
    for file in files:
        report = read_report(file)
        if file.parent != output.resolve():
            parts.append(report)
        elif not report.is_joined:
            raise UserError(
                f"--output: must not contain a report to compare, which would be replaced, got "
                f"{output} (choose another folder)"
            )
    if not parts:
        raise UserError(
            f"--compare: must contain report.json, got none below {', '.join(map(str, folders))}"
        )
    reports = [report.model_copy(update={"is_joined": True}) for report in merge_reports(parts)]
    write_reports(output, reports)
    notes = [note for report in reports for note in report.notes]
    return "\n".join([format_report(reports), *notes])
