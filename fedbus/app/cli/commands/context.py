"""`fedbus context`: the ordinary `nats` program, pointed at this federation."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.diagnostics.nats_context import render_context, select_context, write_context
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings


def context(
    name: Annotated[
        str, typer.Argument(help="What the context is called.", show_default="fedbus-FEDERATION")
    ] = "",
    *,
    select: Annotated[bool, typer.Option("--select", help="Have `nats` use it when none is named.")] = False,
    stdout: Annotated[bool, typer.Option("--stdout", help="Print it, and write nothing.")] = False,
) -> None:
    """Write a context for the `nats` program: address, credentials, authority and inbox."""
    settings = Settings.from_environment()
    called = name or f"fedbus-{settings.fed}"
    if not called.replace("-", "").replace("_", "").isalnum():
        raise CliError(f"{called!r} cannot be a context's name: use letters, digits, hyphens", ExitCode.USAGE)
    text = render_context(settings)
    if stdout:
        print(text)
        return
    path: Path = write_context(called, text)
    print(f"{path} is written; try: nats --context {called} micro ls")
    if select:
        select_context(called)
        print("and it is what `nats` uses now")
