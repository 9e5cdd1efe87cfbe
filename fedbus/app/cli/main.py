"""The command line: the table of commands, and how `fedbus` starts.

Errors end in `fedbus.app.failures`, which also defines the exit codes.
"""

from typing import Any, NoReturn

import typer

from fedbus.app.cli.command_table import COMMANDS
from fedbus.app.cli.lazy import LazyGroup
from fedbus.app.failures import EXIT_CODE_TEXT, run_cli

EXIT_CODES = "\n\n".join(f"{code:>3}  {meaning}" for code, meaning in EXIT_CODE_TEXT.items())


class FedbusCommand(LazyGroup):
    """The command `fedbus`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(table=COMMANDS, **attributes)


app = typer.Typer(
    name="fedbus",
    cls=FedbusCommand,
    epilog=f"Exit codes:\n\n{EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def fedbus() -> None:
    """Operate federated learning: the full lifecycle of an app on a fleet of devices."""


def main() -> NoReturn:
    """Run the command line; the entry point ``fedbus``."""
    run_cli(app)


if __name__ == "__main__":
    main()
