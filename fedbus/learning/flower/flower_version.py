"""Checks that the installed version of Flower has the names that fedbus uses.

Some of them are private, so that a new version of Flower may change them without notice. Each module
`private_api` checks its names when it is imported, which is when the library is opened.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement

from fedbus.contracts.task.app import LibraryUnusable


class UnsupportedFlower(LibraryUnusable):
    """Flower is not installed, or the installed version lacks a name that fedbus uses."""

    def __init__(self, missing: str) -> None:
        supported = supported_versions()
        advice = f"Install a supported version: pip install 'flwr{supported}'"
        try:
            problem = (
                f"Flower {version('flwr')} has no {missing}, which fedbus uses (supported: flwr {supported})"
            )
        except PackageNotFoundError:
            problem = f"Flower is not installed: there is no module {missing!r}"
        super().__init__(f"{problem}. {advice}")


def supported_versions() -> str:
    """Return the versions of Flower that fedbus supports, such as ``<1.43,>=1.41``, from its own requirements."""
    requirements = map(Requirement, requires("fedbus") or [])
    return next((str(found.specifier) for found in requirements if found.name == "flwr"), "")


@contextmanager
def checked_imports() -> Iterator[None]:
    """Replace an ImportError of the block by UnsupportedFlower, which names the missing module or name."""
    try:
        yield
    except UnsupportedFlower:
        raise
    except ImportError as error:
        name = re.match(r"cannot import name '(\w+)'", error.msg)
        raise UnsupportedFlower(f"{error.name}.{name[1]}" if name else str(error.name)) from error


def require_attributes(owner: Any, names: Iterable[str]) -> None:
    """Raise UnsupportedFlower if *owner*, a class, an instance or a module of Flower, lacks one of *names*."""
    known = {*dir(owner), *dir(type(owner))}  # a property of a metaclass may raise
    for name in names:
        if name not in known:
            named = owner if hasattr(owner, "__name__") else type(owner)
            place = (
                named.__name__
                if not hasattr(named, "__module__")
                else f"{named.__module__}.{named.__qualname__}"
            )
            raise UnsupportedFlower(f"{place}.{name}")
