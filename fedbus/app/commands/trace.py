"""`fedbus trace`: one run from its trigger to every client's new model, and what it waited for.

Read off the files in FEDBUS_HOME/traces: no bus, no collector, no Grafana. What devices on other
machines did is in their own files, and in a collector where there is one.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedbus.app.edge import Exit, Failure, writing

if TYPE_CHECKING:
    from fedbus.app.telemetry.reading import Kept
    from fedbus.domain.critical_path import Tree

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
    from rich.console import Console

    from fedbus.app.settings import Settings
    from fedbus.app.waterfall import in_words, waterfall
    from fedbus.domain.critical_path import Tree

    kept = _kept(Settings.from_environment().traces_dir, run)
    if otlp_json is not None:
        with writing(otlp_json):
            otlp_json.write_text(json.dumps(kept.as_otlp(), ensure_ascii=False) + "\n")
        print(f"{len(kept.spans())} spans are in {otlp_json}")
        return
    tree = Tree(kept.spans())
    console = Console(width=width or (None if sys.stdout.isatty() else PIPED_WIDTH), highlight=False)
    if not words:
        console.print(_heading(kept, tree), soft_wrap=True)
        for line in waterfall(tree, console.width):
            console.print(line, no_wrap=True, crop=True)
        console.print()
    for said in in_words(tree):
        console.print(said, soft_wrap=True)


def _heading(kept: "Kept", tree: "Tree") -> str:
    from fedbus.app.waterfall import duration

    spans = tree.by_id.values()
    took = duration(max(one.end for one in spans) - min(one.start for one in spans))
    runs = {str(one.attributes["fedbus.run"]) for one in spans if one.name == "run • → requested"}
    whose = f"{len(spans)} spans of {kept.processes} processes"
    return f"{', '.join(sorted(runs))}  trace {kept.trace_id}  {whose}  {took}\n"


def _kept(directory: Path, run: str) -> "Kept":
    from fedbus.app.telemetry import reading

    if not directory.exists() and (of_demo := directory.parent / "demo" / directory.name).exists():
        directory = of_demo  # `fedbus demo` has a home of its own
    known = reading.runs_in(directory)
    wanted = run or (known[-1] if known else "")
    found = reading.trace_of_run(directory, wanted) if wanted else None
    if found is None:
        kept = f"kept are: {', '.join(known[-10:])}" if known else "none is kept"
        raise Failure(
            f"no trace of {run or 'any run'} in {directory}: {kept}. The machine on which a run was started "
            "keeps its trace; FEDBUS_HOME says where",
            Exit.NOT_FOUND,
        )
    return reading.read_trace(directory, found)
