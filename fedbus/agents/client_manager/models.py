"""The models of one client in one task: which one the server named last, which one serves, and their files.

Part of the client manager, and moved by it alone. A model is a file that is named by its digest: fetched once,
verified while it comes, and taken only if it is sealed by a key that is trusted here.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from fedbus.agents.common.asyncio_tools import backoff_s
from fedbus.bus.blobs import BlobCorrupt, BlobUnavailable
from fedbus.bus.bus import Bus
from fedbus.contracts.model import BlobRef, ModelRef, ModelSignature
from fedbus.contracts.server import GetServerInfo, ServerInfo
from fedbus.stores.models.signing import TrustedKeys

FETCH_ATTEMPTS: Final = 5

log = structlog.get_logger("fedbus.client_manager")


@dataclass(frozen=True)
class ModelAnnouncement:
    """A model that the server has named, and how its word ranks among others."""

    model: ModelRef
    blob: BlobRef
    term: int
    seal: ModelSignature | None
    named_in: str = ""
    """The trace in which it was, as a ``traceparent``."""


def announcement_from(info: ServerInfo) -> ModelAnnouncement | None:
    """The model that is served, as the server's answer has it."""
    if info.model is None or info.blob is None:
        return None
    return ModelAnnouncement(info.model, info.blob, info.term, info.seal)


class DeviceModels:
    """Kept under *directory*; where there are *trusted* keys, one of them has to have signed a model."""

    def __init__(self, bus: Bus, task: str, directory: Path, trusted: TrustedKeys | None) -> None:
        self._bus = bus
        self._task = task
        self._directory = directory
        self._trusted = trusted
        self.newest: ModelAnnouncement | None = None
        """The one that is to be served, as far as was heard; None where it was turned down."""
        self.served: ModelRef | None = None
        """The one that the inference agent answers with, as it said last."""

    def note(self, offered: ModelAnnouncement) -> None:
        """Remember what was *offered*, unless something newer was: words may overtake each other."""
        if self.newest is None or offered.term >= self.newest.term:
            self.newest = offered

    def has_other_than(self, model: ModelRef | None) -> bool:
        """Whether another one than *model* has been named since. Its version may well be a lower one."""
        return self.newest is not None and (model is None or self.newest.model.version != model.version)

    def named_in(self, model: ModelRef) -> str:
        """The trace in which *model* was named, where it is the newest."""
        return self.newest.named_in if self.newest and self.newest.model == model else ""

    def term_of(self, model: ModelRef) -> int:
        """Which champion *model* is, where it is the newest; else 0."""
        return self.newest.term if self.newest and self.newest.model == model else 0

    def check_signature(self, offered: ModelAnnouncement) -> None:
        """Raises StoreError where keys are trusted here and none of them has signed this model."""
        if self._trusted is not None:
            self._trusted.check(self._task, offered.model, offered.seal)

    async def fetch_with_fallback(self, model: ModelRef, blob: BlobRef) -> Path:
        """The model's file; where the giver has gone meanwhile, from the one that the server names now."""
        for attempt in range(FETCH_ATTEMPTS - 1):
            try:
                return await self.fetch(model, blob)
            except (BlobUnavailable, BlobCorrupt) as error:
                log.warning("the model was not fetched", version=model.version, reason=str(error))
                await asyncio.sleep(backoff_s(attempt))
                info: ServerInfo = await self._bus.request(GetServerInfo(task=self._task))
                if info.model == model and info.blob is not None:
                    blob = info.blob
        return await self.fetch(model, blob)

    async def fetch(self, model: ModelRef, blob: BlobRef) -> Path:
        """The model as a file of this client; fetched once, verified while it comes."""
        path = self.path_of(model)
        if not await asyncio.to_thread(path.exists):
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            await self._bus.blobs.fetch_to(blob, path)
        return path

    def path_of(self, model: ModelRef) -> Path:
        return self._directory / "models" / f"{model.sha256}.safetensors"
