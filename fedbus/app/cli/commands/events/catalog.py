"""`fedbus events catalog` and `schema`: the message types."""

from typing import Annotated

import typer

from fedbus.app.docs_generator.pages import body_schema, catalogue_entries
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json


def schema(
    name: Annotated[str | None, typer.Argument(help="Message type.", show_default="all")] = None,
) -> None:
    """Print the JSON Schema of one message type's body, or of all types."""
    types = {entry.name: entry.kind for entry in catalogue_entries()}
    if name is None:
        print_json({each: body_schema(kind) for each, kind in types.items()})
    elif name in types:
        print_json(body_schema(types[name]))
    else:
        raise CliError(f"no message type {name!r}. See: fedbus events catalog", ExitCode.NOT_FOUND)


def catalog(*, json: output.JsonOption = False) -> None:
    """List all message types with their subjects, publishers and subscribers."""
    entries = catalogue_entries()
    if json:
        print_json([entry.as_json() for entry in entries])
        return
    output.print_table(
        ("type", "subject", "source", "subscribers", "data"),
        [(one.name, one.subject, one.publisher, ", ".join(one.consumers), one.summary) for one in entries],
        empty="no message types",
    )
