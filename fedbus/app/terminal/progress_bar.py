"""That something takes its time is seen: a bar or a line that changes, on standard error, where that is a terminal.

    with working("verifying", total=12) as step:
        for version in versions:
            step(1, f"v{version}")

Elsewhere nothing is said: what came out of it is told at the end anyway.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.status import Status
from rich.text import Text

Advance: TypeAlias = Callable[[int, str], None]
ShowStatus: TypeAlias = Callable[[str], None]


@contextmanager
def progress_bar(
    what: str, *, total: int | None = None, console: Console | None = None, wanted: bool = True
) -> Iterator[Advance]:
    """A bar for as long as the block runs. A step: how much is done more, and what is next. *total*: of what.

    *console*: where it is, below what that prints; not *wanted*, there is none.
    """
    console = console or Console(stderr=True)
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        yield lambda _, __: None
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
    if total is not None:
        columns[2:2] = [BarColumn(), MofNCompleteColumn()]
    of_people = sys.stdout.isatty()  # elsewhere standard output is somebody's file, and no line above the bar
    with Progress(*columns, console=console, transient=True, redirect_stdout=of_people) as progress:
        bar = progress.add_task(what, total=total)

        def step(more: int, next_one: str) -> None:
            progress.update(bar, advance=more, description=f"{what} {next_one}".rstrip())

        yield step


@contextmanager
def status_line(console: Console) -> Iterator[ShowStatus]:
    """What is awaited: a line that changes on a terminal, elsewhere a line each time that it is another."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Status("", console=console) as status:
            yield lambda text: status.update(Text(text))
        return
    said: list[str] = []

    def tell(text: str) -> None:
        if said[-1:] != [text]:
            said[:] = [text]
            console.print(text, soft_wrap=True, highlight=False, markup=False)

    yield tell
