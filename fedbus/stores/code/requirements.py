"""Install the Python packages that a task requires, next to its code, if the device allows them.

Only wheels are installed; nothing is built. Packages of this machine are never replaced. Dependencies must be allowed
too, because their code runs with the rights of the task.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedbus.stores.code.subprocesses import ProcessResult, SubprocessFailed, SubprocessRunner

ALLOW_ALL: Final = "*"
INSTALL_TIMEOUT_S: Final = 600.0

_PYTHON_MARKER: Final = ".made-for"
_WHEELS_ONLY: Final = ("--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet")


class NotInstallable(Exception):
    """A requirement of the task is not installed and cannot be installed here."""


def unmet_requirements(requirements: Iterable[str]) -> list[str]:
    """The *requirements* that this Python environment does not meet."""
    return [one for one in requirements if not _is_met(Requirement(one))]


def install(
    requirements: Iterable[str], target: Path, *, allowed: Collection[str], programs: SubprocessRunner
) -> None:
    """Install *requirements* and their dependencies into *target*. Raises NotInstallable."""
    names = [str(Requirement(one)) for one in requirements]
    _check_allowed([Requirement(one).name for one in names], allowed)
    _check_pip()
    chosen = dict(_resolve(names, programs))
    _check_allowed(chosen, allowed)
    _check_replaces_nothing(chosen)
    exact = [f"{name}=={version}" for name, version in chosen.items()]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as directory:
        new = Path(directory) / "libraries"
        _pip("install", "--no-deps", "--target", str(new), *exact, programs=programs)
        (new / _PYTHON_MARKER).write_text(sys.version)
        new.rename(target)


def is_installed(target: Path) -> bool:
    """Whether *target* holds packages installed for this Python version."""
    try:
        return (target / _PYTHON_MARKER).read_text() == sys.version
    except OSError:
        return False


def _resolve(names: list[str], programs: SubprocessRunner) -> Iterator[tuple[str, str]]:
    """The names and versions that pip would install for *names*."""
    done = _pip("install", "--dry-run", "--report", "-", *names, programs=programs)
    try:
        for one in json.loads(done.out)["install"]:
            yield one["metadata"]["name"], one["metadata"]["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotInstallable(
            f"the report of pip is invalid ({error!r}); pip 22.3 or later is needed"
        ) from None


def _check_allowed(names: Iterable[str], allowed: Collection[str]) -> None:
    if ALLOW_ALL in allowed:
        return
    known = {canonicalize_name(name) for name in allowed}
    if wanting := sorted(name for name in names if canonicalize_name(name) not in known):
        raise NotInstallable(
            f"this device does not allow the installation of {', '.join(wanting)}; allow it, or install it by hand"
        )


def _check_replaces_nothing(chosen: dict[str, str]) -> None:
    for name, version in chosen.items():
        if here := _installed_version(name):
            raise NotInstallable(f"it needs {name} {version}, but this machine has {here}; change it by hand")


def _check_pip() -> None:
    if importlib.util.find_spec("pip") is None:
        raise NotInstallable(
            f"there is no pip in {sys.prefix}; install pip, or the packages that the task needs"
        )


def _pip(*arguments: str, programs: SubprocessRunner) -> ProcessResult:
    what, *rest = arguments
    command = [sys.executable, "-P", "-m", "pip", what, *_WHEELS_ONLY, *rest]
    try:
        done = programs.run(command, environment=os.environ, timeout_s=INSTALL_TIMEOUT_S)
    except SubprocessFailed as error:
        raise NotInstallable(f"pip did not finish: {error}") from None
    if done.code != 0:
        raise NotInstallable(f"pip: {done.reason.removeprefix('ERROR: ')}")
    return done


def _is_met(requirement: Requirement, extra: str = "") -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return True
    here = _installed_version(requirement.name)
    if here is None or not requirement.specifier.contains(here, prereleases=True):
        return False
    return all(
        _is_met(Requirement(one), wanted)
        for wanted in requirement.extras
        for one in importlib.metadata.requires(requirement.name) or ()
        if "extra" in one
    )


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
