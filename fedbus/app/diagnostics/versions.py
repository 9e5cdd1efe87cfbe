"""The versions of fedbus, Python, nats-server and the libraries that a bug report names."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as read_version
from typing import Final

from fedbus import __version__
from fedbus.app.local.nats_server import find_nats_server
from fedbus.app.local.supervisor import EmbeddedError
from fedbus.contracts.task.app import LibraryUnusable
from fedbus.learning.installed_libraries import installed_libraries, open_library

PACKAGES: Final = ("torch", "nats-py", "pydantic")
TIMEOUT_S: Final = 10.0


def installed_versions() -> dict[str, str]:
    """Return the version of each component; "none" for one that is not installed."""
    return {
        "fedbus": __version__,
        "python": platform.python_version(),
        "nats-server": nats_server_version() or "none",
        **{name: installed_version(name) or "none" for name in (*PACKAGES, *_library_packages())},
        "system": platform.platform(),
    }


def _library_packages() -> list[str]:
    """Return the packages of the installed training libraries."""
    packages: list[str] = []
    for name in installed_libraries():
        with suppress(LibraryUnusable):
            packages += open_library(name).packages
    return list(dict.fromkeys(packages))


def nats_server_version() -> str | None:
    """Run `nats-server --version`; None if it is missing or fails."""
    try:
        completed = subprocess.run(
            [find_nats_server(), "--version"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, EmbeddedError):
        return None
    return completed.stdout.strip().rpartition("v")[2]


def installed_version(name: str) -> str | None:
    try:
        return read_version(name)
    except PackageNotFoundError:
        return None
