"""`fedbus events catalog` and `schema`: all message types, read from the code."""

from typing import Annotated

import typer

from fedbus.app.docs_generator.pages import body_schema, catalogue_entries
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json


def schema(
    word: Annotated[str | None, typer.Argument(help="Message type; default: all.")] = None,
) -> None:
    """Print the JSON Schema of one message type's body, or of all types."""
    kinds = {entry.word: entry.kind for entry in catalogue_entries()}
    if word is None:
        print_json({name: body_schema(kind) for name, kind in kinds.items()})
    elif word in kinds:
        print_json(body_schema(kinds[word]))
    else:
        raise CliError(f"no message type {word!r}: see fedbus events catalog", ExitCode.NOT_FOUND)


def catalog(*, json: output.JsonOption = False) -> None:
    """List every message type: its subject, publisher and subscribers."""
    entries = catalogue_entries()
    if json:
        print_json([entry.as_facts() for entry in entries])
        return
    output.print_table(
        ("type", "subject", "source", "subscribers", "data"),
        [(one.word, one.subject, one.said_by, ", ".join(one.heard_by), one.gist) for one in entries],
        empty="no message types",
    )
