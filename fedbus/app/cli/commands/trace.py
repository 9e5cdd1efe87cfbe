"""`fedbus trace`: the spans of one run, from its trigger to the new model on each client, and its critical path.

The command reads the span files in FEDBUS_HOME/traces, without NATS or a collector. The spans of devices on other
machines are in the files of those machines, and in the OTLP collector if one is configured.
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
    MAX_CLIENTS,
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
        typer.Argument(help="The run's id, from `fedbus run ls`.", show_default="the newest stored one"),
    ] = "",
    *,
    otlp_json: Annotated[
        Path | None,
        typer.Option("--otlp-json", help="Write the trace to this file as OTLP/JSON, for Grafana or Jaeger."),
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--words", help="Only the waiting times of each round, as text.")
    ] = False,
    all_clients: Annotated[
        bool,
        typer.Option(
            "--all", help=f"Draw the spans of all clients, not only of {MAX_CLIENTS} with the same span."
        ),
    ] = False,
    width: Annotated[
        int | None,
        typer.Option(min=60, max=400, help="Width in columns.", show_default="the width of the terminal"),
    ] = None,
) -> None:
    """Draw the spans of a run, and show what each round waited for."""
    directory = Settings.from_environment().traces_dir
    run, stored = _find_trace(directory, run)
    tree = SpanTree(stored.spans())
    if otlp_json is not None:
        with report_write_errors(otlp_json):
            otlp_json.write_text(json.dumps(stored.as_otlp(), ensure_ascii=False) + "\n")
        print(f"{_count_spans(tree)} are in {otlp_json}")
        return
    console = Console(width=width or (None if sys.stdout.isatty() else PIPED_WIDTH), highlight=False)
    status = run_status(tree, run, has_owner=span_reader.has_running_owner(directory, stored, run))
    if not text_only:
        console.print(describe_run(tree, run, status), style="bold", soft_wrap=True)
        summary = f"{_count_spans(tree)}, of {stored.processes} processes · trace {stored.trace_id}\n"
        console.print(summary, style="dim", soft_wrap=True)
        limit = None if all_clients else MAX_CLIENTS
        for line in render_waterfall(tree, console.width, max_clients=limit):
            console.print(line, no_wrap=True, crop=True)
        console.print(*render_legend(tree), "", sep="\n", style="dim", soft_wrap=True)
    for sentence in describe_waits(tree):
        console.print(sentence, soft_wrap=True)
    if status is RunStatus.ACTIVE and not text_only:
        console.print(
            f"live: fedbus run watch {run} · again: fedbus trace {run}", style="dim", soft_wrap=True
        )


def _count_spans(tree: SpanTree) -> str:
    endings = Counter(span.status for span in tree.by_id.values())
    unfinished = [f"{endings[one]} {one}" for one in (SpanStatus.OPEN, SpanStatus.CUT_OFF) if endings[one]]
    return f"{endings.total()} spans" + (f" ({', '.join(unfinished)})" if unfinished else "")


def _find_trace(directory: Path, run: str) -> tuple[str, StoredTrace]:
    """Find the trace of *run*, or of the newest run.

    Raises:
        CliError: The trace files have no such run.

    """
    if not directory.exists() and (of_demo := directory.parent / "demo" / directory.name).exists():
        directory = of_demo  # `fedbus demo` has its own FEDBUS_HOME
    runs = span_reader.list_runs(directory)
    run_id = run or (runs[-1] if runs else "")
    trace_id = span_reader.find_trace_of_run(directory, run_id) if run_id else None
    if trace_id is None:
        stored = f"stored runs: {', '.join(runs[-10:])}" if runs else "no runs are stored"
        raise CliError(
            f"no trace of {run or 'any run'} in {directory}: {stored}. The machine that started the run has its "
            "trace, in FEDBUS_HOME/traces",
            ExitCode.NOT_FOUND,
        )
    return run_id, span_reader.read_trace(directory, trace_id)
