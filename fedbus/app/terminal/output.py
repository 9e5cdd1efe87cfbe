"""How facts are shown: tables and colours for people, JSON for programs.

What is asked for goes to standard output, all else to standard error. A table is as wide as the terminal, in a
pipe as wide as it has to be; a line breaks between two words, a long word where it has to, and nothing is cut.
"""

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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


def console() -> "Console":
    """Standard output as it is now."""
    from rich.console import Console  # noqa: PLC0415  # 30 ms that `fedbus events decode` does not need

    seen = sys.stdout.isatty()
    return Console(width=None if seen else PIPE_WIDTH, highlight=False, soft_wrap=not seen)


def print_json(facts: Any) -> None:
    """*facts* as one JSON document: indented for a terminal, one line otherwise."""
    print(to_json(facts, indent=2 if sys.stdout.isatty() else None), flush=True)


def to_json(facts: Any, indent: int | None = None) -> str:
    """*facts* as JSON, with the numbers of letters that a terminal would obey."""
    document = json.dumps(to_jsonable(facts), ensure_ascii=False, allow_nan=False, indent=indent)
    return "\n".join(
        line if line.isprintable() else _escape_control_chars(line) for line in document.split("\n")
    )


def _escape_control_chars(line: str) -> str:
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in line)


def to_jsonable(value: Any) -> Any:
    """*value* in words that JSON has: times as ISO 8601, bytes as their size and beginning, "nan" as text."""
    match value:
        case dict():
            return {str(to_jsonable(name)): to_jsonable(item) for name, item in value.items()}
        case list() | tuple():
            return [to_jsonable(item) for item in value]
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case datetime():
            return value.isoformat()
        case bytes():
            return f"<{len(value)} bytes: {value[:16].hex()}{'…' if len(value) > 16 else ''}>"
        case _:
            return str(value)


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


def _build_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], left_out: Sequence[str]
) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    grid = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        if heading not in left_out:
            grid.add_column(heading, no_wrap=not sys.stdout.isatty(), overflow="fold")
    for row in rows:
        shown = [cell for heading, cell in zip(headings, row, strict=True) if heading not in left_out]
        grid.add_row(*[_cell_text(cell) for cell in shown])
    return grid


def _fits(grid: "Table") -> bool:
    """Whether nothing of it is cut; in a pipe nothing ever is."""
    from rich.measure import Measurement  # noqa: PLC0415

    here = console()
    return Measurement.get(here, here.options.update(max_width=PIPE_WIDTH), grid).maximum <= here.width


def _cell_text(fact: object) -> "Text":
    """Text, and never markup: anybody may have said it."""
    from rich.text import Text  # noqa: PLC0415

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


def state_text(name: str) -> "Text":
    from rich.text import Text  # noqa: PLC0415

    return Text(name, style=STATE_STYLES.get(name, ""))


def printable(text: str) -> str:
    """*text*, which anybody may have said, without what would move a cursor, ring a bell or break a line."""
    return "".join(one if one.isprintable() else " " for one in text)


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
