"""The code version that an agent starts with: the last one on the device, else the newest one that is accepted.

If the code repository is unavailable, or its newest commit is rejected, the agent starts with an older version.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import structlog

from fedbus.agents.client_manager.code import VERSION_FILE, read_last_version
from fedbus.app.settings import Settings
from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.address import is_address
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    HistoryRewritten,
    open_code,
)

log = structlog.get_logger("fedbus.initial_code")


def code_from_settings(settings: Settings, address: str) -> CodeRepository:
    """Open the code repository at *address*, or at FEDBUS_TASK if it is empty.

    Raises:
        InvalidCodeSource: The address is not one of a repository.
        GitNotInstalled: The repository needs git.

    """
    source = address or settings.task
    code = open_code(
        source,
        settings.home,
        open_library,
        signers=settings.allowed_signers,
        allow_install=settings.allowed_installs,
    )
    if code.can_update and not code.requires_signatures:
        log.warning("Commits are not verified; set FEDBUS_ALLOWED_SIGNERS", source=code.source)
    return code


def code_address(settings: Settings, source: str) -> str:
    """Return the address in FEDBUS_TASK; else *source*, the repository of the server, in the form of an address.

    ``https://host/x.git main examples/mnist/`` becomes ``git+https://host/x.git@main#subdirectory=examples/mnist``.
    """
    if is_address(settings.task) or not is_address(source):
        return settings.task
    url, ref, *subdirectory = source.split(" ", 2)
    branch = "" if ref == "HEAD" else f"@{ref}"
    return f"git+{url}{branch}" + "".join(f"#subdirectory={path.rstrip('/')}" for path in subdirectory)


def load_initial_task(code: CodeRepository, settings: Settings, client: str = "") -> Task:
    """Load the task to start with, for the server side or for *client*.

    Raises:
        CodeUnavailable: The repository is unavailable, and no version is on this machine.
        CodeRejected: No version is accepted.

    """
    return asyncio.run(
        _load_initial_task(code, list(_last_versions(settings, client)) if client and code.can_update else [])
    )


async def _load_initial_task(code: CodeRepository, last_versions: list[str]) -> Task:
    rejected: CodeRejected | None = None
    for version in [*last_versions, *await _versions_newest_first(code)]:
        try:
            return await code.load_task(version)
        except CodeRejected as error:
            log.warning("Code version rejected", code_version=version, reason=error.reason)
            rejected = rejected or error
    raise rejected or CodeUnavailable(code.source, "it has no commit")


async def _versions_newest_first(code: CodeRepository) -> list[str]:
    """Return the commits of the ref, newest first; those on this machine if the repository is unavailable."""
    newest: list[str] = []
    try:
        newest.append(await code.fetch_latest())
    except HistoryRewritten as error:
        log.warning("Branch history was rewritten; using a known commit", reason=str(error))
    except CodeUnavailable as error:
        known = await code.list_commits()
        if not known:
            raise
        log.warning("Code repository unavailable; using a known commit", reason=str(error))
    return [*newest, *(commit.sha for commit in await code.list_commits() if commit.sha not in newest)]


def _last_versions(settings: Settings, client: str) -> Iterable[str]:
    """Return the last code versions of *client* in all tasks; a repository rejects those of other repositories."""
    found: Iterable[Path] = (settings.home / "clients" / client).glob(f"*/{VERSION_FILE}")
    return (version for path in found if (version := read_last_version(path)))
