"""The library `functions`: what fedbus needs of it, and the static check of its tasks."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError

from fedbus.contracts.run import Scalar
from fedbus.contracts.task.app import (
    AppDeclaration,
    AppProblem,
    Keys,
    find_config_problems,
    flatten_config,
    get_nested,
)
from fedbus.contracts.task.base import ModuleName
from fedbus.contracts.task.task import Task
from fedbus.learning.functions.signatures import FunctionName
from fedbus.learning.functions.source_check import find_module_file, read_module_source
from fedbus.learning.library import BadTask, ClientJob, ClientSession, ServerJob, ServerSession, UpdateSum
from fedbus.learning.weights import Arrays

if TYPE_CHECKING:
    from fedbus.learning.functions.task_module import TaskModule

DEFAULT_ROUNDS: Final = 3
"""The number of rounds of a task that names none."""
RESERVED_KEYS: Final = ("server-round", "proximal-mu", "global-weights")
"""Keys of the configuration that fedbus sets."""

_TABLE: Final[Keys] = ("tool", "fedbus")
_MODULE: Final[Keys] = (*_TABLE, "functions")
_CONFIG: Final[Keys] = (*_TABLE, "config")
_MODULE_NAME = TypeAdapter[str](ModuleName)


class FunctionsLibrary:
    """Training with plain functions over NumPy arrays."""

    packages: Sequence[str] = ("numpy",)

    # --- task side ----------------------------------------------------------------------------

    def read_app(self, pyproject: Mapping[str, Any], directory: PathLike[str]) -> AppDeclaration:
        """Read the module's source, without importing it."""
        table = get_nested(pyproject, _TABLE)
        config = dict(flatten_config(get_nested(table, ("config",))))
        problems = [*_find_reserved_keys(config), *find_config_problems(_CONFIG, config)]
        module = get_nested(table, ("functions",))
        if not _is_module_name(module):
            return AppDeclaration(problems=(*problems, _find_name_problem(module)))
        file = find_module_file(Path(directory), str(module))
        if file is None:
            expected = str(module).replace(".", "/") + ".py"
            what = f"the module {module!r} does not exist"
            return AppDeclaration(
                problems=(*problems, AppProblem(_MODULE, what, f"create {expected}, or correct the name"))
            )
        source = read_module_source(file)
        name = file.relative_to(directory).as_posix()
        problems += [
            AppProblem(_MODULE, one.what, one.advice, file=name, line=one.line) for one in source.problems
        ]
        problems += _find_aggregation_problems(table, source.functions)
        return AppDeclaration(
            references={str(one): f"{module}:{one}" for one in FunctionName if one in source.functions},
            places={str(one): _MODULE for one in source.functions},
            run_config={key: value for key, value in config.items() if isinstance(value, Scalar)},
            rounds=DEFAULT_ROUNDS,
            problems=tuple(problems),
        )

    def check(self, task: Task, *, server_side: bool) -> None:
        """Import the module, and check the functions' parameters. Both sides have the same module."""
        del server_side
        _open_module(task)

    def initial_model(self, task: Task) -> Arrays | None:
        """Return the weights of ``initial``; None if the task does not define it."""
        from fedbus.learning.functions.task_module import FunctionFailed  # noqa: PLC0415 - see `TrainingLibrary`

        module = _open_module(task)
        if not module.has(FunctionName.INITIAL):
            return None
        try:
            return module.initial(dict(task.run_config))
        except FunctionFailed as error:
            raise BadTask(str(error)) from error

    # --- sessions -----------------------------------------------------------------------------

    def open_server(self, job: ServerJob) -> ServerSession:
        """Import the module, and make the strategy."""
        from fedbus.learning.functions.server import FunctionsServer  # noqa: PLC0415

        return FunctionsServer(job, _open_module(job.task))

    def open_client(self, job: ClientJob) -> ClientSession:
        """Import the module."""
        from fedbus.learning.functions.client import FunctionsClient  # noqa: PLC0415

        return FunctionsClient(job, _open_module(job.task))

    def open_sum(self, request: bytes) -> UpdateSum:
        """Return a sum of updates, which are weighted by their examples."""
        del request
        from fedbus.learning.functions.update_sum import FunctionsUpdateSum  # noqa: PLC0415

        return FunctionsUpdateSum()


def _open_module(task: Task) -> "TaskModule":
    """Import the module of *task*. Raises BadTask."""
    from fedbus.learning.functions.task_module import TaskModule  # noqa: PLC0415

    if task.table.functions is None:
        raise BadTask("[tool.fedbus] lacks `functions`, the module with the functions")
    return TaskModule(Path(task.path), task.table.functions)


# --- static check -----------------------------------------------------------------------------


def _find_name_problem(module: object) -> AppProblem:
    advice = 'write the module with the functions: functions = "my_app.functions"'
    if module is None:
        return AppProblem(_TABLE, "[tool.fedbus] lacks `functions`", advice)
    return AppProblem(_MODULE, f"functions {module!r} is not the name of a module", advice)


def _find_reserved_keys(config: Mapping[str, Any]) -> Iterator[AppProblem]:
    for key in RESERVED_KEYS:
        if key in config:
            yield AppProblem((*_CONFIG, key), f"`{key}` is set by fedbus", "choose another key")


def _find_aggregation_problems(table: Any, functions: frozenset[FunctionName]) -> Iterator[AppProblem]:
    strategy = get_nested(table, ("aggregation", "strategy"))
    if FunctionName.AGGREGATE in functions and strategy is not None:
        what = f"strategy {strategy!r} has no effect: the module defines `aggregate`"
        yield AppProblem((*_TABLE, "aggregation", "strategy"), what, "remove one of them")
    if get_nested(table, ("contribution", "every")):
        what = "`every` has no effect with the library functions"
        yield AppProblem((*_TABLE, "contribution", "every"), what, "remove it")


def _is_module_name(value: object) -> bool:
    try:
        _MODULE_NAME.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
