"""How facts are shown: tables and colours for people, JSON for programs.

What is asked for goes to standard output, all else to standard error. A table is as wide as the terminal, in a
pipe as wide as it has to be; a line breaks between two words, a long word where it has to, and nothing is cut.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedbus.app.terminal.plain import printable

JsonOption = Annotated[bool, typer.Option("--json", help="Print facts as JSON, for programs.")]
PIPE_WIDTH: Final = 400

STATE_STYLES: Final = {
    "serving": "green",
    "finished": "green",
    "waiting": "green",
    "learning": "cyan",
    "training": "cyan",
    "running": "cyan",
    "recruiting": "yellow",
    "recovering": "yellow",
    "pending": "yellow",
    "pending_application": "yellow",
    "updating": "yellow",
    "publishing": "yellow",
    "failed": "red",
    "cancelled": "red",
    "terminated": "red",
    "current": "green",
    "candidate": "yellow",
    "rejected": "red",
    "previous": "dim",
    "s0": "dim",
    "empty": "dim",
}


def console() -> Console:
    """Standard output as it is now."""
    seen = sys.stdout.isatty()
    return Console(width=None if seen else PIPE_WIDTH, highlight=False, soft_wrap=not seen)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str, least: Sequence[str] = ()
) -> None:
    """*rows* under *headings*; where there are none, the sentence *empty* on standard error.

    On a terminal that is too narrow for all, the headings in *least* are left out, the first of them first.
    """
    rows, left_out = list(rows), list[str]()
    if not rows:
        print_note(empty)
        return
    grid = _build_table(headings, rows, left_out)
    for heading in least:
        if _fits(grid):
            break
        left_out.append(heading)
        grid = _build_table(headings, rows, left_out)
    console().print(grid, soft_wrap=False)
    if left_out:
        print_note(f"too narrow here for {', '.join(left_out)}: see --json, or a wider terminal")


def _build_table(headings: Sequence[str], rows: Iterable[Sequence[object]], left_out: Sequence[str]) -> Table:
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        if heading not in left_out:
            grid.add_column(heading, no_wrap=not sys.stdout.isatty(), overflow="fold")
    for row in rows:
        shown = [cell for heading, cell in zip(headings, row, strict=True) if heading not in left_out]
        grid.add_row(*[_cell_text(cell) for cell in shown])
    return grid


def _fits(grid: Table) -> bool:
    """Whether nothing of it is cut; in a pipe nothing ever is."""
    here = console()
    return Measurement.get(here, here.options.update(max_width=PIPE_WIDTH), grid).maximum <= here.width


def _cell_text(fact: object) -> Text:
    """Text, and never markup: anybody may have said it."""
    if not isinstance(fact, Text):
        return Text(format_value(fact))
    fact.plain = printable(fact.plain)
    return fact


def format_value(fact: object) -> str:
    """*fact* for a person: times are those of this machine."""
    if isinstance(fact, datetime):
        return f"{fact.astimezone():%Y-%m-%d %H:%M:%S}"
    return printable(str(fact))


def print_note(line: str) -> None:
    """Something to know that is not what was asked for."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        line = textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)


def state_text(name: str) -> Text:
    return Text(name, style=STATE_STYLES.get(name, ""))


def format_age(moment: datetime) -> str:
    """How long ago that was: ``3 s``, ``5 min``, ``2 h``, ``4 d``."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def format_size(count: float) -> str:
    """Bytes as a person says them: ``1.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
