"""The model files of one client in one task: fetched once, verified while they are received, named by their digest."""

import asyncio
from pathlib import Path
from typing import Protocol

import structlog

from fedbus.agents.client_manager.events import ModelAnnouncement
from fedbus.bus.blobs import BlobCorrupt, BlobUnavailable
from fedbus.bus.bus import Bus
from fedbus.common.retry import RetryBackoff
from fedbus.contracts.model import BlobRef, ModelRef
from fedbus.contracts.server import GetServerInfo
from fedbus.stores.models.signing import TrustedKeys

log = structlog.get_logger("fedbus.client_manager")


class ModelFiles(Protocol):
    """The model files of a device."""

    def check_signature(self, announcement: ModelAnnouncement) -> None:
        """Raise StoreError if this device trusts keys and none of them signed the model."""

    async def fetch(self, model: ModelRef, blob: BlobRef, *, attempts: int) -> Path:
        """Fetch *model* and return its file. Raises as `DeviceModels.fetch` does."""

    def path_of(self, model: ModelRef) -> Path:
        """Return the path of the file of *model*, fetched or not."""


class DeviceModels:
    """The model files in *directory*. If there are *trusted* keys, one of them must have signed each model."""

    def __init__(self, bus: Bus, task: str, directory: Path, trusted: TrustedKeys | None) -> None:
        self._bus = bus
        self._task = task
        self._directory = directory
        self._trusted = trusted

    def check_signature(self, announcement: ModelAnnouncement) -> None:
        """Raise StoreError if this device trusts keys and none of them signed the model."""
        if self._trusted is not None:
            self._trusted.verify(self._task, announcement.model, announcement.signature)

    async def fetch(self, model: ModelRef, blob: BlobRef, *, attempts: int) -> Path:
        """Fetch *model* and return its file.

        After a failed attempt, the server is asked for the blob again, since another process may offer it now.

        Raises:
            BlobUnavailable: The blob could not be received in *attempts* attempts.
            BlobCorrupt: The content does not have the digest of the model.
            RequestRefused: The server has no model.
            NoResponse: The server did not answer.

        """
        backoff = RetryBackoff()
        for _ in range(attempts - 1):
            try:
                return await self._fetch(model, blob)
            except (BlobUnavailable, BlobCorrupt) as error:
                log.warning("Model download failed; retrying", version=model.version, reason=str(error))
                await backoff.pause()
                info = await self._bus.request(GetServerInfo(task=self._task))
                if info.model == model and info.blob is not None:
                    blob = info.blob
        return await self._fetch(model, blob)

    async def _fetch(self, model: ModelRef, blob: BlobRef) -> Path:
        path = self.path_of(model)
        if not await asyncio.to_thread(path.exists):
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            await self._bus.blobs.fetch_to(blob, path)
        return path

    def path_of(self, model: ModelRef) -> Path:
        return self._directory / "models" / f"{model.sha256}.safetensors"
