"""The output of commands for people: tables and colours.

Results go to standard output, everything else to standard error. A table is as wide as the terminal, or in a pipe as
wide as its content. Lines are wrapped and never cut.
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

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
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
    """Return a console on standard output."""
    is_terminal = sys.stdout.isatty()
    return Console(width=None if is_terminal else PIPE_WIDTH, highlight=False, soft_wrap=not is_terminal)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str, least: Sequence[str] = ()
) -> None:
    """Print *rows* under *headings*; without rows, print the sentence *empty* on standard error.

    If the terminal is too narrow, the columns in *least* are omitted, from the first on, until the table fits.
    """
    rows, omitted = list(rows), list[str]()
    if not rows:
        print_note(empty)
        return
    grid = _build_table(headings, rows, omitted)
    for heading in least:
        if _fits(grid):
            break
        omitted.append(heading)
        grid = _build_table(headings, rows, omitted)
    console().print(grid, soft_wrap=False)
    if omitted:
        print_note(f"the terminal is too narrow for {', '.join(omitted)}. Use a wider terminal or --json")


def _build_table(headings: Sequence[str], rows: Iterable[Sequence[object]], omitted: Sequence[str]) -> Table:
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        if heading not in omitted:
            grid.add_column(heading, no_wrap=not sys.stdout.isatty(), overflow="fold")
    for row in rows:
        shown = [cell for heading, cell in zip(headings, row, strict=True) if heading not in omitted]
        grid.add_row(*[_cell_text(cell) for cell in shown])
    return grid


def _fits(grid: Table) -> bool:
    """Return whether the table fits the console; in a pipe it always does."""
    target = console()
    options = target.options.update(max_width=PIPE_WIDTH)
    return Measurement.get(target, options, grid).maximum <= target.width


def _cell_text(fact: object) -> Text:
    """Return *fact* as text, never as markup, because it may come from a device."""
    if not isinstance(fact, Text):
        return Text(format_value(fact))
    fact.plain = printable(fact.plain)
    return fact


def format_value(fact: object) -> str:
    """Format *fact* for people, with times in the local time zone."""
    if isinstance(fact, datetime):
        return f"{fact.astimezone():%Y-%m-%d %H:%M:%S}"
    return printable(str(fact))


def print_note(line: str) -> None:
    """Print a remark on standard error."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        line = textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)


def state_text(name: str) -> Text:
    return Text(name, style=STATE_STYLES.get(name, ""))


def format_age(moment: datetime) -> str:
    """Format the time since *moment*: ``3 s ago``, ``5 min ago``, ``2 h ago``, ``4 d ago``."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def format_size(count: float) -> str:
    """Format a number of bytes: ``1.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
