"""`fedbus context`: a context of the `nats` command line for this federation."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.diagnostics.nats_context import render_context, select_context, write_context
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings


def context(
    name: Annotated[str, typer.Argument(help="Name of the context.", show_default="fedbus-FEDERATION")] = "",
    *,
    select: Annotated[bool, typer.Option("--select", help="Make it the default context of `nats`.")] = False,
    stdout: Annotated[
        bool, typer.Option("--stdout", help="Print the context instead of writing it.")
    ] = False,
) -> None:
    """Write a context for the `nats` command line: URL, credentials, CA and inbox prefix."""
    settings = Settings.from_environment()
    context_name = name or f"fedbus-{settings.fed}"
    if not context_name.replace("-", "").replace("_", "").isalnum():
        raise CliError(
            f"{context_name!r} is not a valid context name. Use letters, digits, hyphens and underscores",
            ExitCode.USAGE,
        )
    text = render_context(settings)
    if stdout:
        print(text)
        return
    path: Path = write_context(context_name, text)
    print(f"wrote {path}. Try: nats --context {context_name} micro ls")
    if select:
        select_context(context_name)
        print("it is the default context of nats now")
