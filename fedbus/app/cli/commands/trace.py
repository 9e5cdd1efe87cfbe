"""`fedbus trace`: one run from its trigger to every client's new model, and what it waited for, or waits for now.

Read off the files in FEDBUS_HOME/traces: no bus, no collector, no Grafana. What devices on other
machines did is in their own files, and in a collector where there is one.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from fedbus.app.failures import CliError, ExitCode, report_write_errors
from fedbus.app.settings import Settings
from fedbus.app.telemetry import span_reader
from fedbus.app.telemetry.span_reader import StoredTrace
from fedbus.app.terminal.trace_waterfall import (
    RunStatus,
    describe_run,
    describe_waits,
    render_legend,
    render_waterfall,
    run_status,
)
from fedbus.domain.critical_path import SpanStatus, SpanTree

PIPED_WIDTH: Final = 120


def trace(
    run: Annotated[
        str,
        typer.Argument(help="The run, as `fedbus run ls` calls it.", show_default="the newest that is kept"),
    ] = "",
    *,
    otlp_json: Annotated[
        Path | None,
        typer.Option("--otlp-json", help="Write it into this file, as OTLP/JSON for Grafana or Jaeger."),
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="Only what the rounds waited for.")] = False,
    width: Annotated[
        int | None, typer.Option(min=60, max=400, help="Columns.", show_default="the terminal's")
    ] = None,
) -> None:
    """Draw what happened in a run, and what it waited for."""
    directory = Settings.from_environment().traces_dir
    run, kept = _find_trace(directory, run)
    tree = SpanTree(kept.spans())
    if otlp_json is not None:
        with report_write_errors(otlp_json):
            otlp_json.write_text(json.dumps(kept.as_otlp(), ensure_ascii=False) + "\n")
        print(f"{_count_spans(tree)} are in {otlp_json}")
        return
    console = Console(width=width or (None if sys.stdout.isatty() else PIPED_WIDTH), highlight=False)
    stands = run_status(tree, run, looked_after=span_reader.has_running_owner(directory, kept, run))
    if not words:
        console.print(describe_run(tree, run, stands), style="bold", soft_wrap=True)
        about = f"{_count_spans(tree)}, of {kept.processes} processes · trace {kept.trace_id}\n"
        console.print(about, style="dim", soft_wrap=True)
        for line in render_waterfall(tree, console.width):
            console.print(line, no_wrap=True, crop=True)
        console.print(*render_legend(tree), "", sep="\n", style="dim", soft_wrap=True)
    for said in describe_waits(tree):
        console.print(said, soft_wrap=True)
    if stands is RunStatus.UNDER_WAY and not words:
        console.print(
            f"live: fedbus run watch {run} · again: fedbus trace {run}", style="dim", soft_wrap=True
        )


def _count_spans(tree: SpanTree) -> str:
    endings = Counter(span.ending for span in tree.by_id.values())
    without = [f"{endings[one]} {one}" for one in (SpanStatus.UNDER_WAY, SpanStatus.CUT_OFF) if endings[one]]
    return f"{endings.total()} spans" + (f" ({', '.join(without)})" if without else "")


def _find_trace(directory: Path, run: str) -> tuple[str, StoredTrace]:
    """The run that is meant, and its trace."""
    if not directory.exists() and (of_demo := directory.parent / "demo" / directory.name).exists():
        directory = of_demo  # `fedbus demo` has a home of its own
    known = span_reader.list_runs(directory)
    wanted = run or (known[-1] if known else "")
    found = span_reader.find_trace_of_run(directory, wanted) if wanted else None
    if found is None:
        kept = f"kept are: {', '.join(known[-10:])}" if known else "none is kept"
        raise CliError(
            f"no trace of {run or 'any run'} in {directory}: {kept}. The machine on which a run was started "
            "keeps its trace; FEDBUS_HOME says where",
            ExitCode.NOT_FOUND,
        )
    return wanted, span_reader.read_trace(directory, found)
