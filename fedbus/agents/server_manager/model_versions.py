"""Model versions of one task: made from what a run came to, kept, signed, crowned, given out to clients.

The server manager decides when; here is how. Whatever the repository answers goes to the caller, a no above all;
who can wait for one that is away does so with `waiting_for`.

The *champion* is the version that is served. The pointer to it stands in the repository and is moved by
compare-and-set, so that a manager that was cut off cannot put back what another has moved.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from fedbus.agents.common.asyncio_tools import backoff
from fedbus.bus.blobs import Offer
from fedbus.bus.bus import Bus
from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Artifact, BlobRef, Manifest, ModelRef
from fedbus.contracts.server import ServerFacts
from fedbus.contracts.situations import ServerPublishing
from fedbus.contracts.task.task import TaskTable
from fedbus.contracts.telemetry import tracer_of
from fedbus.domain.model_promotion import Verdict, judge
from fedbus.stores.errors import StoreDamaged, StoreError, StoreUnavailable
from fedbus.stores.models.open import ModelStore, VersionMissing

if TYPE_CHECKING:
    from fedbus.stores.models.signing import Signer

REMEMBERED: Final = 20
"""Former champions that can be gone back to by a plain rollback."""

T = TypeVar("T")

log = structlog.get_logger("fedbus.versions")
tracer = tracer_of("fedbus.versions")


class NothingBefore(StoreError):
    """There is no champion to go back to."""


class StrangeStore(StoreError):
    """The repository is there, and not the one that the log knows."""

    def __init__(self, url: str, why: str, model: ModelRef) -> None:
        super().__init__(
            f"{url} is not the model repository that the log knows, with version {model.version}: {why}; "
            "name that one with --store, or put back what it held: no model is begun anew in its place"
        )


class StoreEmpty(StrangeStore):
    """It is there and holds nothing."""

    def __init__(self, url: str, model: ModelRef) -> None:
        super().__init__(url, "it is empty", model)


@dataclass(frozen=True)
class Served:
    """The champion, and all that is known of it."""

    champion: Champion
    manifest: Manifest


class Versions:
    """The versions of *task* in *models*; the one that is served is on offer on *bus*.

    What it makes is signed by *signer*, where there is one.
    """

    def __init__(self, bus: Bus, task: str, models: ModelStore, signer: "Signer | None" = None) -> None:
        self._bus = bus
        self._task = task
        self._models = models
        self._signer = signer
        self._offer: Offer | None = None
        self._made_with: dict[str, str] = {}
        """By the digest of a model that was served here: the code version that made it."""

    def on_offer(self, model: Artifact) -> BlobRef | None:
        """Where clients get *model*; None where that is not given out."""
        return self._offer.ref if self._offer and self._offer.ref.sha256 == model.sha256 else None

    # --- the champion ------------------------------------------------------------------------

    async def first(self) -> Served | None:
        """The champion, or None where the repository has answered that it is empty; it is made where there is none.

        Only for a federation that never had a model: see `known`. Raises StoreError.
        """
        await self._models.prepare()
        latest = await self._models.latest()
        return await self._served(latest) if latest else None

    async def known(self, model: ModelRef, term: int) -> Served:
        """The champion, in the repository that holds *model*, which the log says is champion in *term*.

        Raises StoreError; StoreEmpty where the repository answers that it holds nothing.
        """
        latest = await self._models.latest()
        if latest is None:
            raise StoreEmpty(self._models.url, model)
        await self._assert_it_has(model)
        if term and await self._models.champion() is None:
            raise StoreDamaged(
                f"{self._models.url}, champion", f"it is gone, and version {model.version} was served"
            )
        return await self._served(latest)

    async def _assert_it_has(self, model: ModelRef) -> None:
        try:
            manifest = await self._models.manifest(model.version)
        except VersionMissing as error:
            raise StrangeStore(self._models.url, str(error), model) from error
        if manifest.sha256 != model.sha256:
            raise StrangeStore(self._models.url, f"its version {model.version} is another model", model)

    async def _served(self, latest: Manifest) -> Served:
        """In a repository of before there were champions, that is the newest version."""
        champion = await self._models.champion()
        if champion is not None:
            return self._noted(champion, await self._models.manifest(champion.version))
        return await self._crown(latest, "the newest version there was")

    async def crown(self, version: int, reason: str, *, anew: bool = False) -> Served:
        """Make *version* the champion; it may be that already, and *anew* it gets another term all the same.

        Raises StoreError.
        """
        return await self._crown(await self._models.manifest(version), reason, anew=anew)

    async def _crown(self, manifest: Manifest, reason: str, *, anew: bool = False) -> Served:
        present = await self._models.champion()
        if present is not None and present.version == manifest.version and not anew:
            return self._noted(present, manifest)
        await self._models.path_of(manifest.sha256)  # its weights must be here: they may have been retired
        before = (present.version, *present.before) if present else ()
        champion = Champion(
            version=manifest.version,
            term=present.term + 1 if present else 1,
            before=tuple(dict.fromkeys(one for one in before if one != manifest.version))[:REMEMBERED],
            since=datetime.now(UTC),
            reason=reason[:500],
        )
        return self._noted(await self._models.crown(champion), manifest)

    def _noted(self, champion: Champion, manifest: Manifest) -> Served:
        self._made_with[manifest.sha256] = manifest.code_version
        return Served(champion, manifest)

    async def code_of(self, model: ModelRef) -> str:
        """The code version that made *model*; raises StoreError."""
        if model.sha256 not in self._made_with:
            self._made_with[model.sha256] = (await self._models.manifest(model.version)).code_version
        return self._made_with[model.sha256]

    async def manifest(self, version: int) -> Manifest:
        """All that is known of *version*; raises StoreError."""
        return await self._models.manifest(version)

    async def before(self) -> int:
        """The champion before this one; raises NothingBefore."""
        present = await self._models.champion()
        if present is None or not present.before:
            raise NothingBefore("there is no champion before this one to go back to: see fedbus model ls")
        return present.before[0]

    # --- new versions -----------------------------------------------------------------------------

    async def publish_first(
        self, artifact: Artifact, *, code_version: str, new_lineage: bool = False
    ) -> Manifest:
        """Make the first version, of the task or of a new lineage. Raises StoreError."""
        versions = await self._models.versions()
        lineage = max((one.lineage for one in versions), default=0)
        if versions and not new_lineage:
            return versions[-1]  # made by who was here before us, between two steps
        manifest = Manifest(
            **artifact.model_dump(include=set(Artifact.model_fields)),
            version=versions[-1].version + 1 if versions else 1,
            task=self._task,
            created=datetime.now(UTC),
            code_version=code_version,
            lineage=lineage + 1,
        )
        return await self._models.publish(self._sealed(manifest))

    async def publish(self, run: ServerPublishing) -> Manifest:
        """Make the next version of the run's checkpoint, or find the one that was made before a restart.

        Raises StoreError.
        """
        latest = await self._models.latest()
        if latest is not None and (latest.run, latest.sha256) == (run.run, run.result.sha256):
            return latest  # another server's run may have the same name, and not the same weights
        parent = await self._models.manifest(run.base.version)
        last = run.last
        manifest = Manifest(
            **run.result.model_dump(include=set(Artifact.model_fields)),
            version=latest.version + 1 if latest else 1,
            task=self._task,
            created=datetime.now(UTC),
            parent=parent.version,
            lineage=parent.lineage,
            run=run.run,
            rounds=run.round,
            participants=last.participants if last else {},
            metrics=last.metrics if last else {},
            config=run.plan.config,
            code_version=run.code_version,
        )
        about: dict[str, str | int] = {"fedbus.model.version": manifest.version}
        with tracer.start_as_current_span("store", attributes=about | {"fedbus.run": run.run}):
            return await self._models.publish(self._sealed(manifest))

    def _sealed(self, manifest: Manifest) -> Manifest:
        return self._signer.seal(manifest) if self._signer else manifest

    async def verdict(self, table: TaskTable, candidate: Manifest, run: ServerPublishing) -> Verdict:
        """Whether *candidate* takes the champion's place by itself; raises StoreError."""
        if candidate.version == run.model.version:
            return Verdict(promote=True, reason="it is served already")
        if run.base.version != run.model.version:
            return Verdict(
                promote=False,
                judged=False,
                reason=f"it was made from version {run.base.version}, and version {run.model.version} has been "
                f"served since: fedbus model promote {candidate.version} serves it all the same",
            )
        served = await self._models.manifest(run.model.version)
        return judge(table.gate, candidate.metrics, served.metrics)

    # --- giving out ---------------------------------------------------------------------------------

    async def offer(self, model: ModelRef, *, receivers: int) -> BlobRef:
        """Give *model* out to whoever asks for it, once for all who ask at the same time. Raises StoreError."""
        path = await self.file_of(model)
        before = self._offer
        self._offer = await self._bus.blobs.offer(path, receivers=max(1, receivers), sha256=model.sha256)
        if before is not None:
            before.release()
        return self._offer.ref

    async def file_of(self, artifact: Artifact) -> Path:
        """A local file with these weights; raises StoreError."""
        return await self._models.path_of(artifact.sha256)

    def withdraw(self) -> None:
        """Give nothing out any more."""
        if self._offer is not None:
            self._offer.release()

    async def retire(self, facts: ServerFacts, keep: int) -> None:
        """Make room in the repository; where it does not work now, after the next run."""
        spare = {one.sha256 for one in (facts.model, facts.base, facts.checkpoint) if one is not None}
        try:
            gone = await self._models.retire(keep=keep, spare=spare)
        except StoreError as error:
            log.warning("old models are kept for now", reason=str(error))
        else:
            if gone:
                log.info("old models were retired", count=len(gone))


async def waiting_for(ask: Callable[[], Awaitable[T]]) -> T:
    """The repository's answer, however long it is away; raises every other StoreError."""
    attempt = 0
    while True:
        try:
            return await ask()
        except StoreUnavailable as error:
            if attempt == 0:
                log.warning("the model repository is away", reason=str(error))
            await asyncio.sleep(backoff(attempt))
            attempt += 1
