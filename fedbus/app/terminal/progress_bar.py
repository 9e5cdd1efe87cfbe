"""Progress bars and status lines on a terminal.

    with progress_bar("verifying", total=12) as advance:
        for version in versions:
            advance(1, f"v{version}")

In a pipe there is no bar: the command prints its result at the end.
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
    """Show a progress bar while the block runs; yield a function that advances it.

    Args:
        what: The text before the bar.
        total: The number of steps; None: unknown, without a bar.
        console: Where to draw, below its other output; by default standard error.
        wanted: False: show nothing.

    """
    console = console or Console(stderr=True)
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        yield lambda _, __: None
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
    if total is not None:
        columns[2:2] = [BarColumn(), MofNCompleteColumn()]
    is_terminal = sys.stdout.isatty()  # the output of a pipe or a file must not go through the bar's console
    with Progress(*columns, console=console, transient=True, redirect_stdout=is_terminal) as progress:
        bar = progress.add_task(what, total=total)

        def advance(steps: int, next_item: str) -> None:
            progress.update(bar, advance=steps, description=f"{what} {next_item}".rstrip())

        yield advance


@contextmanager
def status_line(console: Console) -> Iterator[ShowStatus]:
    """Yield a function that shows a status: in place on a terminal, elsewhere as a new line if it has changed."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Status("", console=console) as status:
            yield lambda text: status.update(Text(text))
        return
    last_text: str | None = None

    def show(text: str) -> None:
        nonlocal last_text
        if text != last_text:
            last_text = text
            console.print(text, soft_wrap=True, highlight=False, markup=False)

    yield show
