"""The model repository as the commands find it: which one, of which task, and a version in it."""

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
"""How long a person waits for an S3 that does not answer."""
SHORT_LENGTH: Final = 12

TaskId = Annotated[
    str | None, typer.Option("--task", help="The task's id.", show_default="the only one there")
]
Store = Annotated[
    str,
    typer.Option(
        help="The model repository: a directory, or s3://bucket/prefix.", show_default="FEDBUS_STORE"
    ),
]
Version = Annotated[str, typer.Argument(help="A version's number, v3 or 3, or: latest, or champion.")]

T = TypeVar("T")


def run_with_store(work: Callable[[ModelStore], Awaitable[T]], task: str | None, store: str) -> T:
    """What *work* finds in the repository of *task*."""
    url = store_address(store)

    async def run() -> T:
        return await work(open_models(url, await resolve_stored_task(url, task)))

    return run_async(run())


def store_address(store: str) -> str:
    """Where the models are: the *store* that was given, else what the settings say; with its key at hand."""
    settings = Settings.from_environment()
    _use_embedded_credentials(settings.s3_dir / "credentials", given=bool(store or settings.configured_store))
    return store or settings.store_url


def open_models(url: str, task: str) -> ModelStore:
    """The models of *task* there, as somebody who does not wait for long reads them."""
    return open_model_store(url, task, patience_s=STORE_TIMEOUT_S)


def _use_embedded_credentials(credentials: Path, *, given: bool) -> None:
    """The key of the S3 that `fedbus up --store s3` runs here; whoever names a repository has one of their own."""
    if not given and credentials.is_file():
        os.environ.setdefault(CREDENTIALS_FILE, str(credentials))


async def resolve_stored_task(url: str, asked: str | None) -> str:
    """The task that was *asked* for, or the only one there is."""
    if asked is not None:
        return task_id(asked)
    known = await list_tasks(url, patience_s=STORE_TIMEOUT_S)
    if len(known) == 1:
        return known[0]
    if not known:
        raise CliError(
            f"there is no model repository at {url}: a server makes one, see fedbus up; or name it with --store",
            ExitCode.NOT_FOUND,
        )
    raise CliError(f"several tasks are there: choose one of {', '.join(known)} with --task", ExitCode.USAGE)


async def find_manifest(models: ModelStore, version: str) -> Manifest:
    if version == "champion":
        return await _champion_manifest(models)
    if version != "latest":
        return await models.manifest(parse_version(version, 0))
    latest = await models.latest()
    if latest is None:
        raise CliError(
            "there is no version yet: the server makes the first one when it starts", ExitCode.NOT_FOUND
        )
    return latest


async def _champion_manifest(models: ModelStore) -> Manifest:
    champion = await models.champion()
    if champion is None:
        raise CliError(
            "there is no champion yet: the server crowns the first version when it starts", ExitCode.NOT_FOUND
        )
    return await models.manifest(champion.version)


def parse_version(version: str, latest: int) -> int:
    """``3``, ``v3`` or ``latest``."""
    if version == "latest" and latest:
        return latest
    digits = version.removeprefix("v")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise CliError(f"{version!r} is no version: write 3, v3 or latest", ExitCode.USAGE)
    return int(digits)


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump()


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Loss and accuracy, where a version has them: `fedbus model show` tells the rest."""
    named = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics} or metrics
    return ", ".join(f"{name} {value:.4g}" for name, value in named.items())
