"""`fedbus data`: the captured rows of the clients on this machine. The commands read their files, without NATS."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.contracts.identifiers import client_id, task_id
from fedbus.stores.captured.export import check_format
from fedbus.stores.captured.export import export as write_table
from fedbus.stores.captured.reader import read_holdout_share, read_row_counts, size_on_disk_bytes

NO_HOLDOUT_SHARE: Final = (
    "an older version of fedbus wrote these rows without the holdout share. "
    "Set it to the task's capture.holdout-share, for example --holdout 0.2"
)

ClientOption = Annotated[str | None, typer.Option(help="Only this client.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="Only this task.")]


def ls(*, client: ClientOption = None, task: TaskOption = None, json: output.JsonOption = False) -> None:
    """List the captured rows of each client, and how many have a label."""
    databases = [_database_facts(database) for database in _find_databases(client, task)]
    if json:
        print_json(databases)
        return
    output.print_table(
        ("client", "task", "rows", "labelled", "size", "file"),
        [
            (
                one["client"],
                one["task"],
                str(one["rows"]),
                str(one["labelled"]),
                output.format_size(one["size_bytes"]),
                one["file"],
            )
            for one in databases
        ],
        empty="no captured rows on this machine",
    )


def export(
    path: Annotated[Path, typer.Argument(help="The file to write, .parquet or .arrow.")],
    *,
    client: ClientOption = None,
    task: TaskOption = None,
    labelled: Annotated[bool, typer.Option("--labelled", help="Only rows with a label.")] = False,
    holdout: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the rows to mark as held out of training.",
            show_default="the task's `capture.holdout-share`",
        ),
    ] = None,
) -> None:
    """Export a client's captured rows to a file for pandas, DuckDB or Spark."""
    check_format(path)
    database = _find_single_database(client, task)
    expected = _database_facts(database)["labelled" if labelled else "rows"]
    share = read_holdout_share(database) if holdout is None else holdout
    if share is None:
        raise CliError(NO_HOLDOUT_SHARE, ExitCode.USAGE)
    with progress_bar("exporting rows", total=expected) as step:
        rows = write_table(
            database, path, holdout_share=share, labelled=labelled, on_batch=lambda more: step(more, "")
        )
    size = output.format_size(path.stat().st_size)
    output.console().print(
        f"exported {rows} rows of {_owner_of(database)} to {path} ({size})", highlight=False
    )


def _find_databases(client: str | None, task: str | None) -> list[Path]:
    """Find the databases of captured rows on this machine."""
    client_pattern = client_id(client) if client else "*"
    task_pattern = task_id(task) if task else "*"
    return sorted(
        (Settings.from_environment().home / "clients").glob(f"{client_pattern}/{task_pattern}/captured.db")
    )


def _find_single_database(client: str | None, task: str | None) -> Path:
    """Find the database of one client in one task.

    Raises:
        CliError: None or several match.

    """
    databases = _find_databases(client, task)
    if not databases:
        raise CliError(
            "no captured rows of such a client in FEDBUS_HOME. See: fedbus data ls",
            ExitCode.NOT_FOUND,
        )
    if len(databases) > 1:
        names = ", ".join(map(_owner_of, databases))
        raise CliError(
            f"several clients have captured rows: {names}. Choose one with --client and --task",
            ExitCode.USAGE,
        )
    return databases[0]


def _owner_of(database: Path) -> str:
    return f"{database.parents[1].name}/{database.parent.name}"


def _database_facts(database: Path) -> dict[str, Any]:
    counts = read_row_counts(database, 0.0)
    return {
        "client": database.parents[1].name,
        "task": database.parent.name,
        "rows": counts.labelled + counts.unlabelled,
        "labelled": counts.labelled,
        "size_bytes": size_on_disk_bytes(database),
        "file": str(database),
    }
