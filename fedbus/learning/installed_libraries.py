"""The training libraries that are installed, by their names in the entry-point group ``fedbus.libraries``."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final, cast

from fedbus.contracts.task.app import LibraryUnusable
from fedbus.learning.library import TrainingLibrary

GROUP: Final = "fedbus.libraries"


@cache
def open_library(name: str) -> TrainingLibrary:
    """Return the library *name*, the same object for each call.

    Raises:
        LibraryUnusable: it is not installed, two packages provide it, or it cannot be imported.

    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    match points:
        case []:
            raise LibraryUnusable(
                f"the training library {name!r} is not installed (installed: {_installed_names()}). "
                "Correct `library` in [tool.fedbus], or install the package that provides it"
            )
        case [point]:
            return _load(point)
        case _:
            packages = ", ".join(sorted({_package_of(point) for point in points}))
            raise LibraryUnusable(
                f"more than one package provides the training library {name!r}: {packages}. "
                "Uninstall all but one of them"
            )


def installed_libraries() -> list[str]:
    """Return the names of the installed libraries, sorted. They may not be importable."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def _installed_names() -> str:
    return (
        ", ".join(installed_libraries())
        or "none; install fedbus again, since its package metadata is outdated"
    )


def _load(point: EntryPoint) -> TrainingLibrary:
    try:
        return cast("TrainingLibrary", point.load()())
    except ImportError as error:
        missing = f" It needs {error.name}: install it" if error.name else ""
        raise LibraryUnusable(
            f"the training library {point.name!r} ({point.value} of {_package_of(point)}) cannot be imported: "
            f"{' '.join(str(error).split())}.{missing}"
        ) from error
    except Exception as error:
        raise LibraryUnusable(
            f"the training library {point.name!r} ({point.value} of {_package_of(point)}) cannot be loaded: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _package_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"
