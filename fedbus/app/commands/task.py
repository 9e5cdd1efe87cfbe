"""`fedbus task`: write a new task, and say what is wrong with one."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app import show
from fedbus.app.edge import Exit, Failure

app = typer.Typer(no_args_is_help=True, help="Write a new task, and say what is wrong with one.")


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="The directory to write; must be empty or not there.")],
    *,
    id: Annotated[str | None, typer.Option(help="The task's id; default: the directory's name.")] = None,
    json: show.AsJson = False,
) -> None:
    """Write a new task: a small Flower app that trains, with all settings of fedbus explained."""
    from fedbus.contracts.identifiers import task_id
    from fedbus.stores.tasks import new_task

    task = task_id(id or path.resolve().name)
    new_task(path, task)
    if json:
        show.as_json({"task": task, "path": str(path)})
    else:
        show.console().print(f"task {task} is in {path}. Next: fedbus task validate {path}")


@app.command()
def validate(
    path: Annotated[Path, typer.Argument(help="The task's directory.")] = Path(),
    *,
    json: show.AsJson = False,
) -> None:
    """Say what is wrong with a task, line by line; nothing wrong is exit code 0."""
    from fedbus.stores.tasks import validate_task

    if not path.is_dir():
        raise Failure(
            f"{path} is not a directory: name the one that holds the task's pyproject.toml", Exit.NOT_FOUND
        )
    problems = validate_task(path)
    if json:
        show.as_json({"path": str(path), "problems": [str(problem) for problem in problems]})
    else:
        from rich.markup import escape

        for problem in problems:
            show.console().print(f"[red]✗[/] {escape(str(problem))}")
    if problems:
        raise Failure(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''} to mend")
    if not json:
        show.console().print(f"[green]✓[/] {path} is a task that fedbus can run")
