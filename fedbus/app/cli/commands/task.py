"""`fedbus task`: create a task, or validate one."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.markup import escape

from fedbus.app.docs_generator.task_keys_page import table_values
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json
from fedbus.contracts.identifiers import task_id
from fedbus.contracts.task.task import DEFAULT_LIBRARY
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import create_task, read_task, validate_task


def new(
    path: Annotated[Path, typer.Argument(help="Directory of the new task; must be empty or not exist.")],
    *,
    id: Annotated[
        str | None, typer.Option(help="The task's id.", show_default="the name of the directory")
    ] = None,
    library: Annotated[
        str,
        typer.Option(
            help="The training library: flower, or functions for plain functions over NumPy arrays."
        ),
    ] = DEFAULT_LIBRARY,
    json: output.JsonOption = False,
) -> None:
    """Create a task: a small app that trains, with comments on all settings of fedbus."""
    task = task_id(id or path.resolve().name)
    create_task(path, task, library=library)
    if json:
        print_json({"task": task, "path": str(path)})
    else:
        output.console().print(f"created task {task} in {path}. Next: fedbus task validate {path}")


def validate(
    path: Annotated[Path, typer.Argument(help="Directory of the task.")] = Path(),
    *,
    keys: Annotated[
        bool, typer.Option("--keys", help="Show all keys with their values and defaults.")
    ] = False,
    build: Annotated[
        bool,
        typer.Option(
            "--build",
            help="Also import the code, build the model, and run one round of two clients in a scratch directory.",
        ),
    ] = False,
    limit_s: Annotated[float, typer.Option(min=1, help="With --build: the time limit, in seconds.")] = 300.0,
    json: output.JsonOption = False,
) -> None:
    """Validate a task; print one line per problem. The exit code is 0 if there is none.

    Without --build, no code of the task is imported.
    """
    if not path.is_dir():
        raise CliError(
            f"{path} is not a directory. Name the directory with the task's pyproject.toml",
            ExitCode.NOT_FOUND,
        )
    problems = validate_task(path, open_library)
    if json and not (build and not problems):
        facts = {"path": str(path), "problems": [str(problem) for problem in problems]}
        print_json(facts | ({"keys": _load_keys(path)} if keys and not problems else {}))
    elif not json:
        for problem in problems:
            output.console().print(f"[red]✗[/] {escape(str(problem))}")
    if problems:
        raise CliError(f"{path}: {pluralize(len(problems), 'problem')} found")
    if not json:
        output.console().print(f"[green]✓[/] {path} is a valid task")
        if keys:
            _print_keys(_load_keys(path))
    if build:
        _try_task(path, limit_s, json=json, facts={"keys": _load_keys(path)} if keys else {})


def _try_task(path: Path, limit_s: float, *, json: bool, facts: dict[str, Any]) -> None:
    """Try the valid task in *path*, and print each step."""
    from fedbus.app.cli.foreground import run_until_signal  # noqa: PLC0415 - as the next line
    from fedbus.app.local.task_trial import (  # noqa: PLC0415 - the agents take a second to import
        TrialFailed,
        scratch_environment,
        try_task,
    )

    task, data_dir = read_task(path, open_library), Settings.from_environment().data_dir
    steps: list[str] = []

    def report(step: str) -> None:
        steps.append(step)
        if not json:
            output.console().print(f"[green]✓[/] {escape(step)}", highlight=False, soft_wrap=True)

    problem = ""
    with (
        TemporaryDirectory(prefix="fedbus-validate-", ignore_cleanup_errors=True) as scratch,
        scratch_environment(path, Path(scratch)),
    ):
        settings = Settings.from_environment().model_copy(update={"configured_data_dir": data_dir})
        try:
            run_until_signal(
                lambda stop: try_task(task, settings, stop, report, limit_s=limit_s),
                "validate",
                level="ERROR",
                log_format="console",
            )
        except TrialFailed as error:
            problem, code = str(error), error.code
    if json:
        print_json({"path": str(path), "problems": [problem] if problem else [], "steps": steps} | facts)
    if problem:
        if not json:
            output.console().print(f"[red]✗[/] {escape(problem)}", highlight=False, soft_wrap=True)
        raise CliError(f"{path}: the task does not run. See the problem above", code)


def _load_keys(path: Path) -> list[dict[str, Any]]:
    return table_values(read_task(path, open_library).table)


def _print_keys(keys: list[dict[str, Any]]) -> None:
    """Print one table for each section of the task; keys that the task sets are marked with an asterisk."""
    for name in dict.fromkeys(one["table"] for one in keys):
        output.console().print(f"\n[{name}]", markup=False, style="bold")
        rows = [
            (
                "*" if one["given"] else "",
                one["name"],
                *("none" if text == "null" else text or "–" for text in (one["value"], one["default"])),
                one["meaning"].replace("``", "`"),
            )
            for one in keys
            if one["table"] == name
        ]
        output.print_table(("", "key", "value", "default", "meaning"), rows, empty="")
