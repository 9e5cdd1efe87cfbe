"""Find the model repository, the task and the version that a command works on."""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from fedbus.app.bus_session import run_async
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.local.seaweedfs import CREDENTIALS_FILE
from fedbus.app.settings import Settings
from fedbus.contracts.identifiers import task_id
from fedbus.contracts.model import Manifest
from fedbus.stores.models.open import ModelStore, list_tasks, open_model_store

STORE_TIMEOUT_S: Final = 3.0
"""How long a command retries an S3 that does not respond."""
SHORT_LENGTH: Final = 12

TaskId = Annotated[str | None, typer.Option("--task", help="The task's id.", show_default="the only task")]
Store = Annotated[
    str,
    typer.Option(
        help="The model repository: a directory, or s3://bucket/prefix.", show_default="FEDBUS_STORE"
    ),
]
Version = Annotated[str, typer.Argument(help="A version: 3, v3, latest or champion.")]

T = TypeVar("T")


def run_with_store(work: Callable[[ModelStore], Awaitable[T]], task: str | None, store: str) -> T:
    """Run *work* with the model store of *task* and return its result."""
    url = store_address(store)

    async def run() -> T:
        return await work(open_models(url, await resolve_stored_task(url, task)))

    return run_async(run())


def store_address(store: str) -> str:
    """Return the URL of the model repository: *store*, else that of the settings, and configure its credentials."""
    settings = Settings.from_environment()
    _use_embedded_credentials(
        settings.s3_dir / "credentials", is_named=bool(store or settings.configured_store)
    )
    return store or settings.store_url


def open_models(url: str, task: str) -> ModelStore:
    """Open the model store of *task* with the retry budget of a command."""
    return open_model_store(url, task, patience_s=STORE_TIMEOUT_S)


def _use_embedded_credentials(credentials: Path, *, is_named: bool) -> None:
    """Use the credentials of the S3 that `fedbus up --store s3` runs here; a named repository has its own."""
    if not is_named and credentials.is_file():
        os.environ.setdefault(CREDENTIALS_FILE, str(credentials))


async def resolve_stored_task(url: str, task: str | None) -> str:
    """Return *task*, or the only task of the repository.

    Raises:
        CliError: The repository has no task, or several.

    """
    if task is not None:
        return task_id(task)
    tasks = await list_tasks(url, patience_s=STORE_TIMEOUT_S)
    if len(tasks) == 1:
        return tasks[0]
    if not tasks:
        raise CliError(
            f"no model repository at {url}. A server creates one (fedbus up); or name another with --store",
            ExitCode.NOT_FOUND,
        )
    raise CliError(
        f"the repository has several tasks. Choose one with --task: {', '.join(tasks)}", ExitCode.USAGE
    )


async def find_manifest(models: ModelStore, version: str) -> Manifest:
    if version == "champion":
        return await _champion_manifest(models)
    if version != "latest":
        return await models.read_manifest(parse_version(version, 0))
    latest = await models.read_latest()
    if latest is None:
        raise CliError("no version yet. The server creates the first one when it starts", ExitCode.NOT_FOUND)
    return latest


async def _champion_manifest(models: ModelStore) -> Manifest:
    champion = await models.read_champion()
    if champion is None:
        raise CliError(
            "no champion yet. The server promotes the first version when it starts", ExitCode.NOT_FOUND
        )
    return await models.read_manifest(champion.version)


def parse_version(version: str, latest: int) -> int:
    """Parse ``3``, ``v3`` or ``latest``.

    Raises:
        CliError: *version* is none of these.

    """
    if version == "latest" and latest:
        return latest
    digits = version.removeprefix("v")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise CliError(f"{version!r} is not a version. Use 3, v3 or latest", ExitCode.USAGE)
    return int(digits)


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump()


def format_metrics(metrics: Mapping[str, float], evaluation_failure: str = "") -> str:
    """Loss and accuracy, or all metrics of a version without these, and whether its evaluation failed."""
    named = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics} or metrics
    shown = [f"{name} {value:.4g}" for name, value in named.items()]
    return ", ".join([*shown, *(["evaluation failed"] if evaluation_failure else [])])
