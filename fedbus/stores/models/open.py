"""Open a model repository by its URL.

    open_model_store("/srv/models", "mnist")                                  a directory; also file:///srv/models
    open_model_store("s3://bucket/models?endpoint=http://host:8333", "mnist") any S3

The scheme names the backend: ``file`` and ``s3`` are part of fedbus, others are entry points of the group
``fedbus.model_stores`` (see `fedbus.stores.models.object_store`). An entry point cannot replace a scheme of fedbus.
A backend is imported when it is used: ``s3`` needs the extra ``fedbus[s3]``.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from fedbus.contracts.identifiers import task_id
from fedbus.stores.errors import UnknownStore
from fedbus.stores.models.interface import (
    ArtifactMissing,
    ArtifactRetired,
    DigestMismatch,
    ModelStore,
    VersionMissing,
    VersionSkipped,
    VersionTaken,
)
from fedbus.stores.models.object_store import ObjectStore
from fedbus.stores.models.repository import ModelRepository

__all__ = [
    "ArtifactMissing",
    "ArtifactRetired",
    "DigestMismatch",
    "ModelRepository",
    "ModelStore",
    "UnknownStore",
    "VersionMissing",
    "VersionSkipped",
    "VersionTaken",
    "list_tasks",
    "open_model_store",
]

GROUP: Final = "fedbus.model_stores"
READ_RETRY_S: Final = 10.0
"""The time for which a store that does not answer is retried, in seconds. Callers retry later."""
TRANSFER_RETRY_S: Final = 90.0
"""The same for artifacts without progress. They hold the work of a run, so a store may be unavailable for a minute."""


def open_model_store(url: str, task: str, *, patience_s: float | None = None) -> ModelStore:
    """Open the model repository at *url*, without I/O; `ModelStore.prepare` creates it. Raises UnknownStore.

    *patience_s* is the time for which a remote store that does not answer is retried, instead of the defaults.
    """
    backend, valid_task = _find_backend(url), task_id(task)
    return ModelRepository(
        backend.open(url, valid_task, patience_s=READ_RETRY_S if patience_s is None else patience_s),
        backend.open(url, valid_task, patience_s=TRANSFER_RETRY_S if patience_s is None else patience_s),
    )


async def list_tasks(url: str, *, patience_s: float | None = None) -> list[str]:
    """Return the tasks that have models in the repository at *url*. Raises UnknownStore."""
    return await _find_backend(url).list_tasks(
        url, patience_s=READ_RETRY_S if patience_s is None else patience_s
    )


def _load_directory() -> type[ObjectStore]:
    from fedbus.stores.models.directory import DirectoryObjectStore  # noqa: PLC0415 (a backend is imported when used)

    return DirectoryObjectStore


def _load_s3() -> type[ObjectStore]:
    from fedbus.stores.models.s3 import S3ObjectStore  # noqa: PLC0415 (needs the extra, and takes a second)

    return S3ObjectStore


BUILT_IN: Final[Mapping[str, Callable[[], type[ObjectStore]]]] = {"file": _load_directory, "s3": _load_s3}
"""By scheme. They are also entry points, but do not depend on the metadata of an installation."""


def _find_backend(url: str) -> type[ObjectStore]:
    scheme, has_scheme, _ = url.partition("://")
    scheme = scheme if has_scheme else "file"
    load = BUILT_IN.get(scheme) or _installed_backends().get(scheme)
    if load is None:
        known = ", ".join(sorted({*BUILT_IN, *_installed_backends()}))
        raise UnknownStore(
            f"unknown model store scheme {scheme!r}; give a directory or a URL with one of: {known}"
        )
    try:
        return load()
    except ModuleNotFoundError as error:
        package = "'fedbus[s3]'" if scheme in BUILT_IN else error.name
        raise UnknownStore(
            f"the model store scheme {scheme!r} needs {error.name}; pip install {package}"
        ) from None


def _installed_backends() -> dict[str, Callable[[], type[ObjectStore]]]:
    points: list[EntryPoint] = list(entry_points(group=GROUP))
    return {point.name: point.load for point in points}
