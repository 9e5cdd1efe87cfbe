"""The functions of a task's module: their names, parameters and results.

    load(…)                                    -> data                       by name: partition_id, num_partitions,
                                                                             node_config, config, captured
    train(weights, data, config)               -> (weights, metrics, num_examples)
    evaluate(weights, data, config)            -> (metrics, num_examples)
    initial(config)                            -> weights                    optional
    aggregate(weights, updates, config)        -> weights                    optional
    evaluate_global(weights, config)           -> metrics                    optional
    predict(weights, inputs)                   -> predictions                optional

`train`, `evaluate` and `aggregate` may have a parameter ``state``: a dict that is kept between the rounds of a run.
"""

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from inspect import Parameter, Signature
from typing import Final


class FunctionName(StrEnum):
    """The functions that a task's module may define."""

    LOAD = "load"
    TRAIN = "train"
    EVALUATE = "evaluate"
    INITIAL = "initial"
    AGGREGATE = "aggregate"
    EVALUATE_GLOBAL = "evaluate_global"
    PREDICT = "predict"


REQUIRED: Final = (FunctionName.LOAD, FunctionName.TRAIN, FunctionName.EVALUATE)
STATE: Final = "state"


@dataclass(frozen=True)
class FunctionShape:
    """What a function takes and returns."""

    positional: tuple[str, ...] = ()
    """Arguments that are passed by position."""
    by_name: frozenset[str] = frozenset()
    """Arguments that are passed by name, if the function has a parameter of this name."""
    result: tuple[str, ...] = ()
    """The values that it returns; more than one are a tuple."""

    @property
    def result_text(self) -> str:
        return f"({', '.join(self.result)})" if len(self.result) > 1 else self.result[0]


SHAPES: Final[Mapping[FunctionName, FunctionShape]] = {
    FunctionName.LOAD: FunctionShape(
        by_name=frozenset({"partition_id", "num_partitions", "node_config", "config", "captured"}),
        result=("data",),
    ),
    FunctionName.TRAIN: FunctionShape(
        ("weights", "data", "config"), frozenset({STATE}), ("weights", "metrics", "num_examples")
    ),
    FunctionName.EVALUATE: FunctionShape(
        ("weights", "data", "config"), frozenset({STATE}), ("metrics", "num_examples")
    ),
    FunctionName.INITIAL: FunctionShape(("config",), result=("weights",)),
    FunctionName.AGGREGATE: FunctionShape(("weights", "updates", "config"), frozenset({STATE}), ("weights",)),
    FunctionName.EVALUATE_GLOBAL: FunctionShape(("weights", "config"), result=("metrics",)),
    FunctionName.PREDICT: FunctionShape(("weights", "inputs"), result=("predictions",)),
}


def usage(name: FunctionName) -> str:
    """Return how the function is defined: ``def evaluate(weights, data, config): return metrics, num_examples``."""
    shape = SHAPES[name]
    parameters = shape.positional or ("partition_id", "num_partitions")
    return f"def {name}({', '.join(parameters)}): return {', '.join(shape.result)}"


def find_parameter_problem(name: FunctionName, signature: Signature) -> str | None:
    """Return why *signature* cannot take the arguments of the function *name*; None if it can."""
    shape = SHAPES[name]
    parameters = list(signature.parameters.values())
    by_name = {
        one.name
        for one in parameters
        if one.name in shape.by_name and one.kind is not Parameter.VAR_POSITIONAL
    }
    rest = signature.replace(parameters=[one for one in parameters if one.name not in by_name])
    if any(one.name in by_name and one.kind is Parameter.POSITIONAL_ONLY for one in parameters):
        return f"its parameter {min(by_name)!r} is positional-only, but it is passed by name"
    positional = [one.name for one in parameters[: len(shape.positional)]]
    if misplaced := by_name.intersection(positional):
        return f"its parameter {min(misplaced)!r} comes before {shape.positional[-1]!r}"
    try:
        rest.bind(*shape.positional)
    except TypeError as error:
        return str(error)
    return None


def signature_of(function: ast.FunctionDef) -> Signature:
    """Return the signature of a function's source, without importing it."""
    return Signature(list(_iter_parameters(function.args)))


def find_return_problem(name: FunctionName, function: ast.FunctionDef) -> tuple[int, str] | None:
    """Return the line and the description of the first ``return`` that cannot be right; None if there is none."""
    expected = SHAPES[name].result
    if len(expected) == 1:
        return None
    for node in _iter_own_nodes(function):
        if not isinstance(node, ast.Return):
            continue
        if node.value is None or isinstance(node.value, ast.Constant | ast.Dict | ast.List):
            return node.lineno, f"returns no ({', '.join(expected)})"
        if isinstance(node.value, ast.Tuple) and not any(
            isinstance(one, ast.Starred) for one in node.value.elts
        ):
            count = len(node.value.elts)
            if count != len(expected):
                return node.lineno, f"returns {count} values instead of ({', '.join(expected)})"
    return None


def _iter_own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield the nodes of a function's body in order, without those of functions and classes inside."""
    pending: list[ast.AST] = list(reversed(function.body))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _iter_parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [
        *((one, Parameter.POSITIONAL_ONLY) for one in arguments.posonlyargs),
        *((one, Parameter.POSITIONAL_OR_KEYWORD) for one in arguments.args),
    ]
    first_default = len(positional) - len(arguments.defaults)
    for index, (one, kind) in enumerate(positional):
        yield Parameter(one.arg, kind, default=None if index >= first_default else inspect.Parameter.empty)
    if arguments.vararg is not None:
        yield Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL)
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        empty = inspect.Parameter.empty if default is None else None
        yield Parameter(one.arg, Parameter.KEYWORD_ONLY, default=empty)
    if arguments.kwarg is not None:
        yield Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD)
