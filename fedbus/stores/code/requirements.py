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
    """Return the *requirements* that this Python environment does not meet."""
    return [requirement for requirement in requirements if not _is_met(Requirement(requirement))]


def install(
    requirements: Iterable[str], target: Path, *, allowed: Collection[str], programs: SubprocessRunner
) -> None:
    """Install *requirements* and their dependencies into *target*. Raises NotInstallable."""
    names = [str(Requirement(requirement)) for requirement in requirements]
    _check_allowed([Requirement(name).name for name in names], allowed)
    _check_pip()
    packages = dict(_resolve(names, programs))
    _check_allowed(packages, allowed)
    _check_replaces_nothing(packages)
    exact = [f"{name}=={version}" for name, version in packages.items()]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as directory:
        new = Path(directory) / "libraries"
        _pip("install", "--no-deps", "--target", str(new), *exact, programs=programs)
        (new / _PYTHON_MARKER).write_text(sys.version)
        new.rename(target)


def is_installed(target: Path) -> bool:
    """Return whether *target* holds packages installed for this Python version."""
    try:
        return (target / _PYTHON_MARKER).read_text() == sys.version
    except OSError:
        return False


def _resolve(names: list[str], programs: SubprocessRunner) -> Iterator[tuple[str, str]]:
    """Yield the names and versions that pip would install for *names*."""
    result = _pip("install", "--dry-run", "--report", "-", *names, programs=programs)
    try:
        for package in json.loads(result.stdout)["install"]:
            yield package["metadata"]["name"], package["metadata"]["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotInstallable(
            f"the report of pip is invalid ({error!r}); pip 22.3 or later is needed"
        ) from None


def _check_allowed(names: Iterable[str], allowed: Collection[str]) -> None:
    if ALLOW_ALL in allowed:
        return
    allowed_names = {canonicalize_name(name) for name in allowed}
    if denied := sorted(name for name in names if canonicalize_name(name) not in allowed_names):
        raise NotInstallable(
            f"this device does not allow the installation of {', '.join(denied)}; allow it, or install it by hand"
        )


def _check_replaces_nothing(packages: dict[str, str]) -> None:
    for name, version in packages.items():
        if installed := _installed_version(name):
            raise NotInstallable(
                f"it needs {name} {version}, but this machine has {installed}; change it by hand"
            )


def _check_pip() -> None:
    if importlib.util.find_spec("pip") is None:
        raise NotInstallable(
            f"there is no pip in {sys.prefix}; install pip, or the packages that the task needs"
        )


def _pip(*arguments: str, programs: SubprocessRunner) -> ProcessResult:
    subcommand, *options = arguments
    command = [sys.executable, "-P", "-m", "pip", subcommand, *_WHEELS_ONLY, *options]
    try:
        result = programs.run(command, environment=os.environ, timeout_s=INSTALL_TIMEOUT_S)
    except SubprocessFailed as error:
        raise NotInstallable(f"pip did not finish: {error}") from None
    if result.returncode != 0:
        raise NotInstallable(f"pip: {result.error_line.removeprefix('ERROR: ')}")
    return result


def _is_met(requirement: Requirement, extra: str = "") -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return True
    installed = _installed_version(requirement.name)
    if installed is None or not requirement.specifier.contains(installed, prereleases=True):
        return False
    return all(
        _is_met(Requirement(dependency), extra_name)
        for extra_name in requirement.extras
        for dependency in importlib.metadata.requires(requirement.name) or ()
        if "extra" in dependency
    )


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
