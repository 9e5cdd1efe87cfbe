"""Which code an agent starts with: the version that the device was on, else the newest that may be run.

A repository that is away, or whose newest commit nobody may run, keeps nobody from starting with what
is here and in order.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import structlog

from fedbus.agents.client_manager.code import VERSION_FILE, read_last_version
from fedbus.app.settings import Settings
from fedbus.contracts.task.task import Task
from fedbus.stores.code.address import is_address
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    HistoryRewritten,
    open_code,
)

log = structlog.get_logger("fedbus.code")


def code_from_settings(settings: Settings, where: str) -> CodeRepository:
    """The code repository at *where*, or of FEDBUS_TASK; raises BadCodeSource and GitMissing."""
    source = where or settings.task
    code = open_code(
        source, settings.home, signers=settings.allowed_signers, allow_install=settings.allowed_installs
    )
    if code.follows and not code.verifies:
        log.warning(
            "commits are not verified: name who may sign them in FEDBUS_ALLOWED_SIGNERS", source=code.source
        )
    return code


def code_address(settings: Settings, source: str) -> str:
    """The address in FEDBUS_TASK; else *source*, what the server says that it follows, as an address again.

    ``https://host/x.git main examples/mnist/`` is ``git+https://host/x.git@main#subdirectory=examples/mnist``.
    """
    if is_address(settings.task) or not is_address(source):
        return settings.task
    url, ref, *below = source.split(" ", 2)
    at = "" if ref == "HEAD" else f"@{ref}"
    return f"git+{url}{at}" + "".join(f"#subdirectory={one.rstrip('/')}" for one in below)


def load_initial_task(code: CodeRepository, settings: Settings, client: str = "") -> Task:
    """The task to start with, on the server side or on *client*; raises CodeUnavailable and CodeRejected."""
    return asyncio.run(
        _load_initial_task(code, list(_last_versions(settings, client)) if client and code.follows else [])
    )


async def _load_initial_task(code: CodeRepository, kept: list[str]) -> Task:
    rejected: CodeRejected | None = None
    for version in [*kept, *await _versions_newest_first(code)]:
        try:
            return await code.task_at(version)
        except CodeRejected as error:
            log.warning("not this version", code=version, reason=error.reason)
            rejected = rejected or error
    raise rejected or CodeUnavailable(code.source, "it has no commit that could be run")


async def _versions_newest_first(code: CodeRepository) -> list[str]:
    """What the ref points at and what it pointed at before; what is known here where the repository is away."""
    newest: list[str] = []
    try:
        newest.append(await code.newest())
    except HistoryRewritten as error:
        log.warning("the code is not followed", reason=str(error))
    except CodeUnavailable as error:
        known = await code.history()
        if not known:
            raise
        log.warning("the code repository is away", reason=str(error))
    return [*newest, *(commit.sha for commit in await code.history() if commit.sha not in newest)]


def _last_versions(settings: Settings, client: str) -> Iterable[str]:
    """The versions that *client* was on when it ended, in all of its tasks: another repository refuses them."""
    found: Iterable[Path] = (settings.home / "clients" / client).glob(f"*/{VERSION_FILE}")
    return (version for path in found if (version := read_last_version(path)))
