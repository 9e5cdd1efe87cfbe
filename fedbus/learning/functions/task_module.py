"""The module of a task with its functions: imported, checked, and called with checks of what they return.

Every error names the function, and the file and the line where it happened.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import numpy as np

from fedbus.learning import task_code
from fedbus.learning.functions.signatures import (
    REQUIRED,
    SHAPES,
    FunctionName,
    find_parameter_problem,
    usage,
)
from fedbus.learning.functions.updates import (
    MAX_EXAMPLES,
    MAX_METRIC_NAME_CHARS,
    MAX_METRICS,
    BadUpdate,
    Update,
    Weights,
    check_weights,
)
from fedbus.learning.library import BadTask
from fedbus.learning.task_code import describe_error

Config = dict[str, Any]
"""The configuration that a function gets: the run configuration, and values of fedbus such as ``server-round``."""

T = TypeVar("T")


class FunctionFailed(Exception):
    """A function of the task raised, or returned something invalid. The text is one line with the place."""

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind
        """The type of the exception."""


class TaskModule:
    """The functions of the task in the directory *path*, in its module *name*.

    Raises:
        BadTask: the module cannot be imported, lacks a function, or a function has wrong parameters.

    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        module = task_code.load_module(path, name)
        self._functions: dict[FunctionName, Callable[..., Any]] = {}
        self._by_name: dict[FunctionName, set[str]] = {}
        for function_name in FunctionName:
            function = getattr(module, function_name, None)
            if function is None and function_name in REQUIRED:
                raise BadTask(
                    f"{_relative(module.__file__, path)} does not define {function_name}. Add {usage(function_name)}"
                )
            if function is not None:
                self._functions[function_name] = self._check(function_name, function)

    def has(self, name: FunctionName) -> bool:
        return name in self._functions

    def takes(self, name: FunctionName, parameter: str) -> bool:
        """Return whether the function has a parameter that is passed by name."""
        return parameter in self._by_name.get(name, set())

    # --- calls --------------------------------------------------------------------------------

    def load(self, values: Mapping[str, Any]) -> Any:
        """Load the data. *values* are passed to the parameters of these names. Raises FunctionFailed."""
        return self._call(FunctionName.LOAD, (), values)

    def initial(self, config: Config) -> Weights:
        """Return the first weights. Raises FunctionFailed."""
        return self._check_result(
            FunctionName.INITIAL, check_weights, self._call(FunctionName.INITIAL, (config,))
        )

    def train(
        self, weights: Weights, data: Any, config: Config, state: dict[str, Any]
    ) -> tuple[Weights, dict[str, float], int]:
        """Train on a client. Raises FunctionFailed."""
        result = self._call(FunctionName.TRAIN, (weights, data, config), {"state": state})
        new_weights, metrics, num_examples = self._unpack(FunctionName.TRAIN, result)
        return (
            self._check_result(FunctionName.TRAIN, check_weights, new_weights),
            self._check_result(FunctionName.TRAIN, _check_metrics, metrics),
            self._check_result(FunctionName.TRAIN, _check_num_examples, num_examples),
        )

    def evaluate(
        self, weights: Weights, data: Any, config: Config, state: dict[str, Any]
    ) -> tuple[dict[str, float], int]:
        """Evaluate on a client. Raises FunctionFailed."""
        result = self._call(FunctionName.EVALUATE, (weights, data, config), {"state": state})
        metrics, num_examples = self._unpack(FunctionName.EVALUATE, result)
        return (
            self._check_result(FunctionName.EVALUATE, _check_metrics, metrics),
            self._check_result(FunctionName.EVALUATE, _check_num_examples, num_examples),
        )

    def aggregate(
        self, weights: Weights, updates: list[Update], config: Config, state: dict[str, Any]
    ) -> Weights:
        """Aggregate with the task's own function. Raises FunctionFailed."""
        result = self._call(FunctionName.AGGREGATE, (weights, updates, config), {"state": state})
        return self._check_result(FunctionName.AGGREGATE, check_weights, result)

    def evaluate_global(self, weights: Weights, config: Config) -> dict[str, float]:
        """Evaluate on the server. Raises FunctionFailed."""
        result = self._call(FunctionName.EVALUATE_GLOBAL, (weights, config))
        return self._check_result(FunctionName.EVALUATE_GLOBAL, _check_metrics, result)

    def fail(self, name: FunctionName, reason: str) -> FunctionFailed:
        """Return the error that the result of a function is invalid."""
        return FunctionFailed(f"{name} at {self._place_of(self._functions[name])}: {reason}", "BadUpdate")

    def _call(
        self, name: FunctionName, arguments: tuple[Any, ...], by_name: Mapping[str, Any] | None = None
    ) -> Any:
        function = self._functions[name]
        named = {key: value for key, value in (by_name or {}).items() if key in self._by_name[name]}
        try:
            return function(*arguments, **named)
        except (Exception, SystemExit) as error:
            reason = describe_error(error, self._path)
            raise FunctionFailed(f"{name} raised {reason}", type(error).__name__) from error

    def _unpack(self, name: FunctionName, result: Any) -> tuple[Any, ...]:
        expected = SHAPES[name]
        if not isinstance(result, tuple | list) or len(result) != len(expected.result):
            found = (
                f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
            )
            raise self.fail(name, f"it returned {found} instead of {expected.result_text}")
        return tuple(result)

    def _check_result(self, name: FunctionName, check: Callable[[Any], T], value: Any) -> T:
        try:
            return check(value)
        except BadUpdate as error:
            raise self.fail(name, str(error)) from None

    # --- check --------------------------------------------------------------------------------

    def _check(self, name: FunctionName, value: object) -> Callable[..., Any]:
        if not callable(value):
            raise BadTask(f"{name} of {self._path} is a {type(value).__name__}. Write {usage(name)}")
        function: Callable[..., Any] = value
        if inspect.iscoroutinefunction(function):
            raise BadTask(
                f"{name} at {self._place_of(function)} is a coroutine function. Write def instead of async def"
            )
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some functions in C have none
            self._by_name[name] = set()
            return function
        if reason := find_parameter_problem(name, signature):
            raise BadTask(
                f"{name} at {self._place_of(function)} cannot be called as fedbus calls it ({reason}). "
                f"Write {usage(name)}"
            )
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())
        by_name = SHAPES[name].by_name
        self._by_name[name] = set(by_name if takes_any else by_name & signature.parameters.keys())
        return function

    def _place_of(self, function: Any) -> str:
        code = getattr(inspect.unwrap(function), "__code__", None)
        if not isinstance(code, CodeType):
            return f"{getattr(function, '__module__', self._path)}"
        return f"{_relative(code.co_filename, self._path)}:{code.co_firstlineno}"


def _relative(file: str | None, path: Path) -> str:
    if file is None:
        return str(path)
    resolved, root = Path(file).resolve(), path.resolve()
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else file


def _check_metrics(metrics: object) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise BadUpdate(f"the metrics are a {type(metrics).__name__}. Return a dict of numbers")
    if len(metrics) > MAX_METRICS:
        raise BadUpdate(f"{len(metrics)} metrics (limit {MAX_METRICS})")
    return {_check_metric_name(name): _check_metric(name, value) for name, value in metrics.items()}


def _check_metric_name(name: object) -> str:
    if not isinstance(name, str):
        raise BadUpdate(f"the metric name {name!r} is not a string")
    if len(name) > MAX_METRIC_NAME_CHARS:
        raise BadUpdate(
            f"the metric name {name[:MAX_METRIC_NAME_CHARS]!r}… has {len(name)} characters "
            f"(limit {MAX_METRIC_NAME_CHARS})"
        )
    return name


def _check_metric(name: str, value: object) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        try:
            return float(value)
        except OverflowError:
            raise BadUpdate(f"metric {name!r} is too large for a float") from None
    raise BadUpdate(f"metric {name!r} is a {type(value).__name__}. Return a number")


def _check_num_examples(value: object) -> int:
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise BadUpdate(f"num_examples is {value!r}, which is not an integer") from None
    if isinstance(value, bool) or not 0 <= count <= MAX_EXAMPLES:
        raise BadUpdate(f"num_examples is {value!r}. Return the number of examples, at least 0")
    return count
