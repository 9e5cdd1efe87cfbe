"""The app of a task as a training library reads it from ``pyproject.toml``, without importing its code."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, TypeAlias

from fedbus.contracts.run import Scalar

Keys: TypeAlias = tuple[str, ...]
"""The keys of a value in ``pyproject.toml``, from the outermost table: ``("tool", "fedbus", "model")``."""


def get_nested(document: Any, keys: Keys) -> Any:
    """Return the value at *keys* of a parsed ``pyproject.toml``; None if there is none."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def flatten_config(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the items of a run configuration: ``{"optimizer": {"lr": 0.1}}`` has the key ``optimizer.lr``."""
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(value, dict):
            yield from flatten_config(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_config_problems(section: Keys, config: Mapping[str, Any]) -> Iterator["AppProblem"]:
    """Yield a problem for each value of the flattened *config* at *section* that a run configuration cannot hold."""
    for key, value in config.items():
        if not isinstance(value, Scalar):
            what = f"`{key}` has the type {type(value).__name__}, which a run configuration cannot hold"
            yield AppProblem((*section, key), what, "use a number, a string, true or false")


def missing_key_problem(section: Keys, key: str, table: Mapping[str, Any]) -> "AppProblem":
    """Return the problem that the *table* at *section* lacks *key*. It suggests the correction of a similar key."""
    close = difflib.get_close_matches(key, table, n=1)
    advice = f"did you mean `{key}` instead of `{close[0]}`?" if close else f"add a line: {key} = …"
    return AppProblem(section, f"[{'.'.join(section)}] lacks `{key}`", advice)


class LibraryUnusable(Exception):
    """The training library cannot be used on this machine. The text is the reason and what to do, on one line."""


@dataclass(frozen=True)
class AppProblem:
    """A problem of an app: the keys in ``pyproject.toml`` that it concerns, a description and advice."""

    keys: Keys
    what: str
    advice: str
    file: str = ""
    """The file that has the problem, relative to the task's directory, instead of ``pyproject.toml``."""
    line: int = 1
    """The line in *file*."""


@dataclass(frozen=True, kw_only=True)
class AppDeclaration:
    """What ``pyproject.toml`` declares of an app. If it has *problems*, the other attributes may be incomplete."""

    references: Mapping[str, str] = field(default_factory=dict)
    """The app's own objects by role, each as ``module:name``: ``{"serverapp": "my_app.server:app"}``. The library
    chooses the roles. The role ``predict`` is used for serving if ``[tool.fedbus]`` names no ``predict``."""
    places: Mapping[str, Keys] = field(default_factory=dict)
    """The keys in ``pyproject.toml`` of each role, so that an error about a reference can name its line."""
    run_config: Mapping[str, Scalar] = field(default_factory=dict)
    """The app's own run configuration, flattened: ``{"optimizer.lr": 0.1}``."""
    rounds: int | None = None
    """The app's own number of rounds, if it declares one."""
    rounds_key: str = ""
    """The key of the run configuration that has this number; empty if none has it."""
    problems: tuple[AppProblem, ...] = ()


class AppReader(Protocol):
    """The static part of a training library. Implementations import no code of the task."""

    def read_app(self, pyproject: Mapping[str, Any], directory: PathLike[str]) -> AppDeclaration:
        """Read the app in *directory* from its parsed ``pyproject.toml``. Do not raise: return problems."""


class FindAppReader(Protocol):
    """Finds the reader of a library by its name."""

    def __call__(self, name: str, /) -> AppReader:
        """Return the reader of the library *name*. Raises LibraryUnusable."""
