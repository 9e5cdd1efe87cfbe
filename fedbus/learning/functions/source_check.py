"""Checks the module of a task by its source, without importing it."""

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedbus.learning.functions.signatures import (
    REQUIRED,
    SHAPES,
    FunctionName,
    find_parameter_problem,
    find_return_problem,
    signature_of,
    usage,
)


@dataclass(frozen=True)
class SourceProblem:
    """A problem at a line of a source file."""

    line: int
    what: str
    advice: str


@dataclass(frozen=True)
class ModuleSource:
    """The functions that the source of a module defines, and its problems."""

    functions: frozenset[FunctionName]
    problems: tuple[SourceProblem, ...]


def find_module_file(directory: Path, module: str) -> Path | None:
    """Return the file of *module* in the task's *directory*; None if it does not exist."""
    bare = directory.joinpath(*module.split("."))
    return next((file for file in (bare.with_suffix(".py"), bare / "__init__.py") if file.is_file()), None)


def read_module_source(file: Path) -> ModuleSource:
    """Read the source *file*, and find its problems."""
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ModuleSource(frozenset(), (SourceProblem(line, "is not Python", reason),))
    definitions = dict(_iter_definitions(tree.body))
    has_star = "*" in definitions
    functions = frozenset(
        name for name in FunctionName if name in definitions or (has_star and name in REQUIRED)
    )
    return ModuleSource(functions, tuple(_find_problems(definitions, functions)))


def _find_problems(
    definitions: dict[str, ast.stmt], functions: frozenset[FunctionName]
) -> Iterator[SourceProblem]:
    for name in REQUIRED:
        if name not in functions:
            yield SourceProblem(1, f"does not define `{name}`", _advise_missing(name, definitions))
    for name in FunctionName:
        statement = definitions.get(name)
        if isinstance(statement, ast.AsyncFunctionDef):
            yield SourceProblem(
                statement.lineno, f"`{name}` is a coroutine function", "write def instead of async def"
            )
        elif isinstance(statement, ast.ClassDef):
            yield SourceProblem(statement.lineno, f"`{name}` is a class", f"write {usage(name)}")
        elif isinstance(statement, ast.FunctionDef):
            yield from _find_function_problems(name, statement)


def _find_function_problems(name: FunctionName, function: ast.FunctionDef) -> Iterator[SourceProblem]:
    if function.decorator_list:  # a decorator may change the parameters and the result
        return
    if reason := find_parameter_problem(name, signature_of(function)):
        yield SourceProblem(
            function.lineno,
            f"`{name}` cannot be called as fedbus calls it ({reason})",
            f"write {_advice(name)}",
        )
    if problem := find_return_problem(name, function):
        line, what = problem
        yield SourceProblem(line, f"`{name}` {what}", f"write return {', '.join(SHAPES[name].result)}")


def _advice(name: FunctionName) -> str:
    names = sorted(SHAPES[name].by_name)
    if not names:
        return usage(name)
    if name is FunctionName.LOAD:
        return f"{usage(name)}, with any of the parameters {', '.join(names)}"
    return f"{usage(name)}; a last parameter `{names[0]}` is optional"


def _advise_missing(name: FunctionName, definitions: dict[str, ast.stmt]) -> str:
    others = [other for other in definitions if other not in set(FunctionName)]
    if close := difflib.get_close_matches(name, others, n=1):
        return f"did you mean `{close[0]}`? Write {usage(name)}"
    return f"add {usage(name)}"


def _iter_definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the names that a module defines when it is imported, with their statements, as far as its source shows."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, statement
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                for alias in aliases:
                    yield alias.asname or alias.name.split(".")[0], statement
            case ast.Assign(targets=targets):
                for target in targets:
                    for node in ast.walk(target):
                        if isinstance(node, ast.Name):
                            yield node.id, statement
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                yield name, statement
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While():
                yield from _iter_definitions(
                    [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]
                )
                for handler in getattr(statement, "handlers", []):
                    yield from _iter_definitions(handler.body)
            case _:
                pass
