"""Model versions of one task: made from what a run came to, kept in the repository, given out to clients.

The server manager decides when; here is how. A repository that is away is waited for; every other
answer of its, a no above all, goes to the caller.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import structlog

from fedbus.agents.tasks import backoff
from fedbus.bus.blobs import Offer
from fedbus.bus.bus import Bus
from fedbus.contracts.model import Artifact, BlobRef, Manifest, ModelRef
from fedbus.contracts.server import ServerFacts
from fedbus.contracts.task import Task
from fedbus.stores.errors import StoreError, StoreUnavailable
from fedbus.stores.models import ModelStore

T = TypeVar("T")

log = structlog.get_logger("fedbus.versions")


class Versions:
    """The versions of *task* in *models*; the one that is served is on offer on *bus*."""

    def __init__(self, bus: Bus, task: Task, models: ModelStore) -> None:
        self._bus = bus
        self._task = task
        self._models = models
        self._offer: Offer | None = None

    @property
    def on_offer(self) -> BlobRef | None:
        """Where clients get the served version."""
        return self._offer.ref if self._offer else None

    async def newest(self) -> Manifest | None:
        """The newest version, or None where the repository has answered that it is empty. Raises StoreError."""
        await self._models.prepare()
        return await self._models.latest()

    async def publish_first(self, artifact: Artifact, facts: ServerFacts) -> Manifest:
        """Make the first version. Raises StoreError."""
        return await self._models.publish(self._manifest(artifact, facts, version=1))

    async def publish(self, facts: ServerFacts) -> Manifest:
        """Make the next version of the run's checkpoint, or find the one that was made before a restart.

        Waits for a repository that is away; raises every other StoreError.
        """
        return await _waiting_for(lambda: self._publish(facts))

    async def _publish(self, facts: ServerFacts) -> Manifest:
        assert facts.checkpoint is not None
        latest = await self._models.latest()
        if latest is not None and latest.run == facts.run:
            return latest
        version = latest.version + 1 if latest else 1
        return await self._models.publish(self._manifest(facts.checkpoint, facts, version=version))

    def _manifest(self, artifact: Artifact, facts: ServerFacts, *, version: int) -> Manifest:
        last = facts.last
        return Manifest(
            **artifact.model_dump(include=set(Artifact.model_fields)),
            version=version,
            task=self._task.id,
            created=datetime.now(UTC),
            parent=version - 1 or None,
            run=facts.run,
            rounds=facts.round,
            participants=last.participants if last else {},
            metrics=last.metrics if last else {},
            code_version=self._task.code_version,
        )

    async def offer(self, model: ModelRef, *, receivers: int) -> BlobRef:
        """Give *model* out to whoever asks for it, once for all who ask at the same time."""
        path = await self.file_of(model)
        before = self._offer
        self._offer = await self._bus.blobs.offer(path, receivers=max(1, receivers), sha256=model.sha256)
        if before is not None:
            before.release()
        return self._offer.ref

    async def file_of(self, artifact: Artifact) -> Path:
        """A local file with these weights, however long the repository is away."""
        return await _waiting_for(lambda: self._models.path_of(artifact.sha256))

    def withdraw(self) -> None:
        """Give nothing out any more."""
        if self._offer is not None:
            self._offer.release()

    async def retire(self, facts: ServerFacts) -> None:
        """Make room in the repository; where it does not work now, after the next run."""
        spare = {one.sha256 for one in (facts.model, facts.checkpoint) if one is not None}
        try:
            gone = await self._models.retire(keep=self._task.table.keep_models, spare=spare)
        except StoreError as error:
            log.warning("old models are kept for now", reason=str(error))
        else:
            if gone:
                log.info("old models were retired", count=len(gone))


async def _waiting_for(ask: Callable[[], Awaitable[T]]) -> T:
    """The repository's answer, however long it is away."""
    attempt = 0
    while True:
        try:
            return await ask()
        except StoreUnavailable as error:
            if attempt == 0:
                log.warning("the model repository is away", reason=str(error))
            await asyncio.sleep(backoff(attempt))
            attempt += 1
