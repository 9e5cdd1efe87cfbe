"""Options that `fedbus simulate`, `fedbus experiment` and `fedbus data partition` share."""

from typing import Any

import typer

from fedbus.learning.data.partitioning import describe_syntax


def clients_option(*, show_default: bool | str = True) -> Any:
    return typer.Option(min=1, help="Number of virtual clients.", show_default=show_default)


def rounds_option(*, show_default: str) -> Any:
    return typer.Option(min=1, help="Number of rounds.", show_default=show_default)


def partition_option(*, show_default: bool | str = True, panel: str | None = None) -> Any:
    return typer.Option(
        "--partition",
        metavar="PARTITION",
        help=f"How the data are divided: {describe_syntax()}.",
        show_default=show_default,
        rich_help_panel=panel,
    )


def overrides_option(*, of: str = "") -> Any:
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Override a value of the run configuration{of}: lr=0.1. Repeatable.",
        show_default=False,
    )


def profile_option() -> Any:
    return typer.Option(
        help="Delays, speeds and absences of the clients: a YAML file or a built-in profile.",
        show_default="none",
    )


def data_option(*, panel: str | None = None) -> Any:
    return typer.Option(
        "--data", help="Folder of the data sets.", show_default="FEDBUS_DATA_DIR", rich_help_panel=panel
    )
