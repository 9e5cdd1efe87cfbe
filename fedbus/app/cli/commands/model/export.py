"""`fedbus model export`: copy the weights of a version to a file."""

import hashlib
import shutil
from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.cli.commands.model.repository import (
    Store,
    TaskId,
    Version,
    find_manifest,
    manifest_facts,
    run_with_store,
)
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.common.filesystem import SHARED_MODE, atomic_open
from fedbus.contracts.model import Manifest
from fedbus.stores.models.open import ModelStore


def export(
    version: Version,
    path: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    task: TaskId = None,
    store: Store = "",
    json: output.JsonOption = False,
) -> None:
    """Copy the weights of a version to a file."""
    if path.is_dir():
        raise CliError(f"{path} is a directory. Name a file in it", ExitCode.USAGE)
    if path.exists() and not force:
        raise CliError(f"{path} already exists. Name another file, or use --force", ExitCode.USAGE)

    async def read(models: ModelStore) -> Manifest:
        manifest = await find_manifest(models, version)
        with progress_bar(f"exporting v{manifest.version}, {output.format_size(manifest.size_bytes)}"):
            _copy(await models.local_path(manifest.sha256), path, manifest.sha256)
        return manifest

    manifest = run_with_store(read, task, store)
    if json:
        print_json(manifest_facts(manifest) | {"path": str(path.absolute())})
    else:
        output.console().print(
            f"exported v{manifest.version} to {path}, {output.format_size(manifest.size_bytes)}, {manifest.sha256}"
        )


def _copy(source: Path, target: Path, sha256: str) -> None:
    """Copy a file and verify its digest.

    Raises:
        CliError: The file cannot be written, or the digest is wrong; *target* is unchanged.

    """
    try:
        with atomic_open(target, mode=SHARED_MODE) as part, source.open("rb") as file:
            shutil.copyfileobj(file, part)
            part.seek(0)
            actual = hashlib.file_digest(part, "sha256").hexdigest()
            if actual != sha256:
                raise CliError(
                    f"the weights have digest {actual} instead of {sha256}. See: fedbus model verify"
                )
    except OSError as error:
        raise CliError(f"cannot write {target}: {error.strerror or error}", ExitCode.MACHINE) from None
