"""The model repository: artifacts named by their digest, versions written once, and a pointer to the latest.

    open_store("/srv/models", "mnist")                                  a directory
    open_store("s3://bucket/models?endpoint=http://host:8333", "mnist") any S3

What every backend promises stands in `models_interface`; each backend in a module of its own.
The one for S3 is imported where it is asked for: it needs the extra ``fedbus[s3]``.
"""

import asyncio
from pathlib import Path

from fedbus.contracts.identifiers import TaskId, task_id
from fedbus.stores.errors import UnknownStore
from fedbus.stores.models.directory import DirectoryModelStore, list_tasks_in_directory
from fedbus.stores.models.interface import (
    ArtifactMissing,
    ArtifactRetired,
    DigestMismatch,
    ModelStore,
    VersionMissing,
    VersionSkipped,
    VersionTaken,
)

__all__ = [
    "ArtifactMissing",
    "ArtifactRetired",
    "DigestMismatch",
    "DirectoryModelStore",
    "ModelStore",
    "UnknownStore",
    "VersionMissing",
    "VersionSkipped",
    "VersionTaken",
    "list_tasks",
    "open_model_store",
]


def open_model_store(url: str, task: str, *, patience_s: float | None = None) -> ModelStore:
    """The model repository at *url*. It is not touched yet, nor made: see `ModelStore.prepare`.

    *patience_s*: how long to wait for one that is afar and does not answer, in the place of what is usual.
    """
    scheme, found, _ = url.partition("://")
    if not found:
        return DirectoryModelStore(Path(url), task_id(task))
    if scheme == "s3":
        return _open_bucket_store(url, task_id(task), patience_s)
    raise UnknownStore(
        f"{scheme!r} is no kind of model repository that is known here: give a directory, or s3://bucket/prefix"
    )


async def list_tasks(url: str, *, patience_s: float | None = None) -> list[str]:
    """The tasks that have models in the repository at *url*."""
    if "://" not in url:
        return await asyncio.to_thread(list_tasks_in_directory, Path(url))
    open_model_store(url, "any")  # refuses what is no address
    from fedbus.stores.models.s3 import list_tasks_in_bucket  # noqa: PLC0415 (needs the extra, and a second)

    return await list_tasks_in_bucket(url, patience_s)


def _open_bucket_store(url: str, task: TaskId, patience_s: float | None) -> ModelStore:
    try:
        from fedbus.stores.models.s3 import S3ModelStore  # noqa: PLC0415 (needs the extra, and a second)
        from fedbus.stores.s3.bucket import BucketAddress  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UnknownStore(f"a repository in S3 needs {error.name}: pip install 'fedbus[s3]'") from None
    return S3ModelStore(BucketAddress.parse(url), task, patience_s=patience_s)
