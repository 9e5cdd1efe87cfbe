"""Flower as a `TrainingLibrary`: ServerApps and ClientApps run unmodified over fedbus's messages.

This module is imported by agents that only read ``pyproject.toml``, so it imports flwr in the methods that need it.
"""

import logging
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

from fedbus.contracts.task.aggregation import MODE_FIELDS, AggregationTable
from fedbus.contracts.task.app import (
    AppDeclaration,
    AppProblem,
    Keys,
    find_config_problems,
    flatten_config,
    get_nested,
    missing_key_problem,
)
from fedbus.contracts.task.task import Task
from fedbus.learning.library import ClientJob, ClientSession, ServerJob, ServerSession, UpdateSum
from fedbus.learning.weights import Arrays

COMPONENTS_TABLE: Final = ("tool", "flwr", "app", "components")
CONFIG_TABLE: Final = ("tool", "flwr", "app", "config")
FEDBUS_TABLE: Final = ("tool", "fedbus")
FUNCTIONS_KEYS: Final = ("functions", "config")
STRATEGY_KEYS: Final = tuple(
    str(field.alias)
    for name, field in AggregationTable.model_fields.items()
    if name != "method" and name not in MODE_FIELDS
)
ROLES: Final = ("serverapp", "clientapp")
ROUNDS_KEY: Final = "num-server-rounds"
"""The key of the run configuration that Flower's templates use for the number of rounds."""


class FlowerLibrary:
    """The library ``flower``."""

    packages = ("flwr",)

    def read_app(self, pyproject: Mapping[str, Any], directory: PathLike[str]) -> AppDeclaration:  # noqa: ARG002
        """Read ``[tool.flwr.app]``."""
        components = get_nested(pyproject, COMPONENTS_TABLE)
        config = dict(flatten_config(get_nested(pyproject, CONFIG_TABLE)))
        problems = [
            *_check_components(components),
            *_check_config_table(pyproject),
            *find_config_problems(CONFIG_TABLE, config),
            *_check_rounds(config),
            *_find_keys_of_other_libraries(pyproject),
        ]
        rounds = _read_rounds(config.get(ROUNDS_KEY))
        references = components if isinstance(components, dict) else {}
        return AppDeclaration(
            references={role: references[role] for role in ROLES if role in references},
            places={role: (*COMPONENTS_TABLE, role) for role in ROLES},
            run_config=config,
            rounds=rounds or None,
            rounds_key=ROUNDS_KEY,
            problems=tuple(problems),
        )

    def check(self, task: Task, *, server_side: bool) -> None:
        check_flower()
        from fedbus.learning.flower import task_code  # noqa: PLC0415 - imports flwr

        task_code.load_client_app(Path(task.path), task.app["clientapp"])
        if server_side:
            task_code.load_server_app(Path(task.path), task.app["serverapp"])

    def initial_model(self, task: Task) -> Arrays | None:  # noqa: ARG002
        """Return None: a Flower app has initial arrays only when it runs."""
        return None

    def open_server(self, job: ServerJob) -> ServerSession:
        check_flower()
        from fedbus.learning.flower.server_app_host import ServerAppHost  # noqa: PLC0415 - imports flwr

        remove_log_handlers()
        return ServerAppHost(job)

    def open_client(self, job: ClientJob) -> ClientSession:
        check_flower()
        from fedbus.learning.flower.client_app_host import ClientAppHost  # noqa: PLC0415 - imports flwr

        remove_log_handlers()
        return ClientAppHost(job)

    def open_sum(self, request: bytes) -> UpdateSum:
        """Return a sum of updates, which are weighted by the metric *request*."""
        from fedbus.learning.flower.update_sum import FlowerUpdateSum  # noqa: PLC0415 - imports flwr

        return FlowerUpdateSum(request.decode())


def check_flower() -> None:
    """Raise UnsupportedFlower if Flower lacks a name that fedbus uses."""
    from fedbus.learning.flower import private_api  # noqa: F401, PLC0415 - its import checks the names


def remove_log_handlers() -> None:
    """Remove the handlers and the level that Flower sets when it is imported, so that its lines are written once."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def _find_keys_of_other_libraries(pyproject: Mapping[str, Any]) -> Iterator[AppProblem]:
    """Yield the keys of the library functions: a Flower app has its own configuration and strategy."""
    table = get_nested(pyproject, FEDBUS_TABLE)
    aggregation = get_nested(table, ("aggregation",))
    used: list[Keys] = [(key,) for key in FUNCTIONS_KEYS if isinstance(table, dict) and key in table]
    used += [
        ("aggregation", key) for key in STRATEGY_KEYS if isinstance(aggregation, dict) and key in aggregation
    ]
    for keys in used:
        what = f"`{keys[-1]}` has no effect with the library flower"
        yield AppProblem((*FEDBUS_TABLE, *keys), what, 'add library = "functions", or remove it')


def _check_config_table(pyproject: Mapping[str, Any]) -> Iterator[AppProblem]:
    table = get_nested(pyproject, CONFIG_TABLE)
    if table is not None and not isinstance(table, dict):
        section = ".".join(CONFIG_TABLE)
        yield AppProblem(CONFIG_TABLE, f"{section} is not a table", f"write a section [{section}]")


def _check_rounds(config: Mapping[str, Any]) -> Iterator[AppProblem]:
    """Yield a problem if the value is not a number: fedbus shows the rounds, and `rounds` of a run overrides them."""
    value = config.get(ROUNDS_KEY, 0)
    if _read_rounds(value) is None:
        what = f"`{ROUNDS_KEY}` is {value!r}, which is not a number of rounds"
        yield AppProblem((*CONFIG_TABLE, ROUNDS_KEY), what, "use a whole number, for example 3")


def _read_rounds(value: object) -> int | None:
    """Return *value* as a number of rounds, or None. 3.0 and "3" are one, because an app may convert them by `int`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return None
    is_whole = not isinstance(value, float) or value == number
    return number if is_whole and number >= 0 else None


def _check_components(table: object) -> Iterator[AppProblem]:
    section = ".".join(COMPONENTS_TABLE)
    if not isinstance(table, dict):
        yield AppProblem(
            COMPONENTS_TABLE, f"there is no section [{section}]", "name the serverapp and clientapp in it"
        )
        return
    for role in ROLES:
        if role not in table:
            yield missing_key_problem(COMPONENTS_TABLE, role, table)
