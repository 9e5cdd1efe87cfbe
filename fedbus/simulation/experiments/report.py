"""The report of an experiment: findings, tables and plots, as files and as one Markdown page."""

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import machine, python_version
from typing import TYPE_CHECKING, Any, Final

from fedbus.common.filesystem import SHARED_MODE, atomic_write
from fedbus.contracts.task.app import LibraryUnusable
from fedbus.learning.installed_libraries import installed_libraries, open_library
from fedbus.simulation.experiments.cells import CellRecord, CellValue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES: Final = ("fedbus", "numpy", "torch")
"""Packages whose versions the page names, besides those of the training libraries."""
ABSENT: Final = "–"


@dataclass(frozen=True)
class Finding:
    """One result as a sentence."""

    text: str
    is_met: bool | None = None
    """Whether a goal is met; None if the sentence states no goal."""

    @property
    def mark(self) -> str:
        return {True: "met: ", False: "not met: ", None: ""}[self.is_met]


@dataclass(frozen=True)
class ReportTable:
    """A table; the first column names the rows."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot; *draw* fills an empty figure."""

    file: str
    title: str
    draw: "Callable[[Figure], None]"
    size: tuple[float, float] = (8.0, 4.5)
    """Width and height in inches, at 100 pixels an inch."""


@dataclass(frozen=True)
class ExperimentReport:
    """The report of an experiment."""

    title: str
    setting: Sequence[str]
    """What was run, one line each."""
    findings: Sequence[Finding] = ()
    tables: Sequence[ReportTable] = ()
    plots: Sequence[Plot] = ()
    rows: Sequence[Mapping[str, CellValue | None]] = ()
    """The rows of ``results.csv``: one for each cell."""


@dataclass(frozen=True)
class ReportContext:
    """How the experiment was run."""

    command: str
    seeds: Sequence[int]
    wall_s: float
    """The computing time of all cells, in seconds; of several at once, the sum."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """The reasons of failed cells, by the cell's name."""


def write_report(
    report: ExperimentReport, records: Sequence[CellRecord], context: ReportContext, directory: Path
) -> list[Path]:
    """Write ``results.json``, ``results.csv``, the plots and ``README.md``; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "results.json", directory / "results.csv"]
    _write(written[0], json.dumps(_as_json(report, records, context), indent=1, allow_nan=False))
    _write(written[1], format_csv(report.rows))
    for plot in report.plots:
        written.append(directory / plot.file)
        save_plot(plot, written[-1])
    written.append(directory / "README.md")
    _write(written[-1], format_page(report, context))
    return written


def format_page(report: ExperimentReport, context: ReportContext) -> str:
    """Format the report as a Markdown page."""
    lines = [f"# {report.title}", ""]
    lines += [f"- {finding.mark}{finding.text}" for finding in report.findings]
    lines += ["", "## Setting", "", "```", context.command, "```", ""]
    lines += [f"- {line}" for line in report.setting]
    seeds = ", ".join(map(str, context.seeds))
    lines += [
        f"- {'seeds' if len(context.seeds) > 1 else 'seed'} {seeds}; {format_versions()}",
        f"- computing time of all cells: {format_seconds(context.wall_s)}",
    ]
    for name, reason in context.failures.items():
        lines.append(f"- the cell `{name}` failed: {reason}")
    for table in report.tables:
        lines += ["", f"## {table.title}", "", *format_markdown_table(table)]
        lines += ["", table.note] if table.note else []
    for plot in report.plots:
        lines += ["", f"![{plot.title}]({plot.file})"]
    return "\n".join(lines) + "\n"


def format_markdown_table(table: ReportTable) -> list[str]:
    """Format a table in Markdown, with padded columns that people can read."""
    cells = [[_escape(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.headings))]
    widths = [max(width, 3) for width in widths]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [cells[0], rule, *cells[1:]]
    return ["| " + " | ".join(_pad(line, widths)) + " |" for line in lines]


def format_csv(rows: Sequence[Mapping[str, CellValue | None]]) -> str:
    """Format *rows*; a column that a row lacks is empty."""
    headings = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, headings, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def save_plot(plot: Plot, path: Path) -> None:
    """Draw *plot* as a PNG file."""
    import matplotlib as mpl  # noqa: PLC0415 (an extra, and slow to load)

    mpl.use("Agg")
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=plot.size, layout="constrained")
    plot.draw(figure)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def format_versions() -> str:
    """Return the versions of fedbus, Python and the packages that compute."""
    parts = [f"Python {python_version()} on {sys.platform} {machine()}"]
    packages = list(PACKAGES)
    for library in installed_libraries():
        with suppress(LibraryUnusable):
            packages += open_library(library).packages
    for package in dict.fromkeys(packages):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Format a duration: ``4.2 s``, ``3 min 20 s``, ``1 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _as_json(
    report: ExperimentReport, records: Sequence[CellRecord], context: ReportContext
) -> dict[str, Any]:
    return {
        "title": report.title,
        "command": context.command,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": format_versions(),
        "seeds": list(context.seeds),
        "setting": list(report.setting),
        "findings": [{"text": one.text, "met": one.is_met} for one in report.findings],
        "tables": [
            {"title": one.title, "headings": list(one.headings), "rows": [list(row) for row in one.rows]}
            for one in report.tables
        ],
        "failures": dict(context.failures),
        "cells": [record.model_dump(exclude={"format"}) for record in records],
    }


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def _pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = line
    return [
        first.ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
    ]


def _write(path: Path, content: str) -> None:
    atomic_write(path, content, mode=SHARED_MODE, durable=False)
