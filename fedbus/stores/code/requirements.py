"""What a task needs beside Flower and torch: there already, or installed beside its code where the device allows it.

Nothing is built here: only wheels are taken. Nothing that this machine has is replaced, and
whatever comes along must be allowed as well, since a wheel's code runs as the task's own does.
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
    """What the task needs cannot be had here; the text says why, and what to do."""


def unmet_requirements(requirements: Iterable[str]) -> list[str]:
    """Those of *requirements* that this Python does not meet."""
    return [one for one in requirements if not _is_met(Requirement(one))]


def install(
    requirements: Iterable[str], target: Path, *, allowed: Collection[str], programs: SubprocessRunner
) -> None:
    """Install *requirements*, and what they need themselves, into *target*; raises NotInstallable."""
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
    """Whether something was installed into *target*, for this very Python."""
    try:
        return (target / _PYTHON_MARKER).read_text() == sys.version
    except OSError:
        return False


def _resolve(names: list[str], programs: SubprocessRunner) -> Iterator[tuple[str, str]]:
    """What pip would install for *names* beside what is there: names and versions."""
    done = _pip("install", "--dry-run", "--report", "-", *names, programs=programs)
    try:
        for one in json.loads(done.out)["install"]:
            yield one["metadata"]["name"], one["metadata"]["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotInstallable(
            f"pip does not say what it would install: {error!r}; is it older than 22.3?"
        ) from None


def _check_allowed(names: Iterable[str], allowed: Collection[str]) -> None:
    if ALLOW_ALL in allowed:
        return
    known = {canonicalize_name(name) for name in allowed}
    if wanting := sorted(name for name in names if canonicalize_name(name) not in known):
        raise NotInstallable(
            f"this device allows no installation of {', '.join(wanting)}: allow it, or install it there"
        )


def _check_replaces_nothing(chosen: dict[str, str]) -> None:
    for name, version in chosen.items():
        if here := _installed_version(name):
            raise NotInstallable(
                f"it needs {name} {version} and this machine has {here}: change it there by hand"
            )


def _check_pip() -> None:
    if importlib.util.find_spec("pip") is None:
        raise NotInstallable(f"there is no pip in {sys.prefix}: install it there, or what the task needs")


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
