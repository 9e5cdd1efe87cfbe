"""Model versions of one task: published, signed, promoted, offered to clients.

The machine decides when. Every error of the store goes to the caller; `wait_for_store` retries one
that is unavailable.

The *champion* is the version that is served. The pointer to it is in the store and moves by compare-and-set, so
that a manager that was cut off cannot undo what another has promoted.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from fedbus.agents.server_manager.events import ChampionDetails
from fedbus.bus.blobs import BlobOffer
from fedbus.bus.bus import Bus
from fedbus.common import clock
from fedbus.common.retry import retry
from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Artifact, BlobRef, Manifest, ModelRef
from fedbus.contracts.server import StoreProblem
from fedbus.contracts.situations import ServerPublishing
from fedbus.contracts.task.task import TaskTable
from fedbus.contracts.telemetry import get_tracer
from fedbus.domain.model_promotion import PromotionVerdict, judge_candidate
from fedbus.stores.errors import StoreCorrupt, StoreDenied, StoreError, StoreUnavailable
from fedbus.stores.models.open import ModelStore, VersionMissing

if TYPE_CHECKING:
    from fedbus.stores.models.signing import ModelSigner

MAX_FORMER_CHAMPIONS: Final = 20
"""Former champions that a rollback without a version can reach."""

T = TypeVar("T")

log = structlog.get_logger("fedbus.model_versions")
tracer = get_tracer("fedbus.model_versions")


class NoPreviousChampion(StoreError):
    """There is no champion to roll back to."""


class WrongStore(StoreError):
    """The store is usable, but is not the one that the log names."""

    def __init__(self, url: str, reason: str, model: ModelRef) -> None:
        super().__init__(
            f"{url} is not the model repository that the log names, with version {model.version}: {reason}. "
            "Pass the original store with --store, or restore its contents; fedbus will not create a new model in a "
            "store that lost one"
        )


class StoreEmpty(WrongStore):
    """The store is usable, and holds nothing."""

    def __init__(self, url: str, model: ModelRef) -> None:
        super().__init__(url, "it is empty", model)


def trouble_of(error: StoreError) -> StoreProblem:
    """Classify *error*. A missing object that should exist counts as damage."""
    match error:
        case StoreEmpty():
            return StoreProblem.EMPTY
        case StoreDenied():
            return StoreProblem.DENIED
        case StoreUnavailable():
            return StoreProblem.UNAVAILABLE
        case _:
            return StoreProblem.DAMAGED


class ModelVersions:
    """The versions of *task* in *models*; the champion is offered on *bus*.

    New versions are signed by *signer*, if there is one.
    """

    def __init__(self, bus: Bus, task: str, models: ModelStore, signer: "ModelSigner | None" = None) -> None:
        self._bus = bus
        self._task = task
        self._models = models
        self._signer = signer
        self._offer: BlobOffer | None = None
        self._code_of_model: dict[str, str] = {}
        """By the digest of a model: the code version that made it."""

    # --- the champion ------------------------------------------------------------------------

    async def load_first(self) -> ChampionDetails | None:
        """Return the champion; the latest version if none is promoted, None if the store is empty.

        For a federation that never had a model; see `load_known`. Raises StoreError.
        """
        await self._models.prepare()
        latest = await self._models.read_latest()
        return await self._load_served(latest) if latest else None

    async def load_known(self, model: ModelRef, term: int) -> ChampionDetails:
        """Load the champion of the store, which must hold *model*, the champion of the log in *term*.

        Raises StoreError; StoreEmpty if the store is empty.
        """
        latest = await self._models.read_latest()
        if latest is None:
            raise StoreEmpty(self._models.url, model)
        await self._check_holds(model)
        if term and await self._models.read_champion() is None:
            raise StoreCorrupt(
                f"{self._models.url}, champion", f"it is missing, and version {model.version} was served"
            )
        return await self._load_served(latest)

    async def _check_holds(self, model: ModelRef) -> None:
        try:
            manifest = await self._models.read_manifest(model.version)
        except VersionMissing as error:
            raise WrongStore(self._models.url, str(error), model) from error
        if manifest.sha256 != model.sha256:
            raise WrongStore(self._models.url, f"its version {model.version} is another model", model)

    async def _load_served(self, latest: Manifest) -> ChampionDetails:
        """In a store without a champion pointer, the latest version becomes the champion."""
        champion = await self._models.read_champion()
        if champion is not None:
            return self._record_champion(champion, await self._models.read_manifest(champion.version))
        return await self._promote(latest, "the latest version of the store")

    async def promote(self, version: int, reason: str, *, new_term: bool = False) -> ChampionDetails:
        """Make *version* the champion; raises StoreError.

        Args:
            version: The version; it may be the champion already.
            reason: Why it is promoted.
            new_term: Start another term even if *version* is the champion.

        """
        return await self._promote(await self._models.read_manifest(version), reason, new_term=new_term)

    async def _promote(self, manifest: Manifest, reason: str, *, new_term: bool = False) -> ChampionDetails:
        present = await self._models.read_champion()
        if present is not None and present.version == manifest.version and not new_term:
            return self._record_champion(present, manifest)
        await self._models.local_path(manifest.sha256)  # fails here if its weights were deleted
        before = (present.version, *present.before) if present else ()
        champion = Champion(
            version=manifest.version,
            term=present.term + 1 if present else 1,
            before=tuple(dict.fromkeys(one for one in before if one != manifest.version))[
                :MAX_FORMER_CHAMPIONS
            ],
            since=clock.now(),
            reason=reason[:500],
        )
        return self._record_champion(await self._models.set_champion(champion), manifest)

    def _record_champion(self, champion: Champion, manifest: Manifest) -> ChampionDetails:
        self._code_of_model[manifest.sha256] = manifest.code_version
        return ChampionDetails(champion, manifest)

    async def read_code_version(self, model: ModelRef) -> str:
        """Read the code version that made *model*; raises StoreError."""
        if model.sha256 not in self._code_of_model:
            self._code_of_model[model.sha256] = (await self._models.read_manifest(model.version)).code_version
        return self._code_of_model[model.sha256]

    async def has_free_architecture(self, model: ModelRef) -> bool:
        """Return whether a run has changed the architecture of *model* in its lineage; raises StoreError.

        The first version of a lineage is what the task's builder makes. A later version with other arrays is what an
        app made of it, such as trees that grow: a builder cannot be expected to make the same.
        """
        versions = await self._models.list_versions()
        own = next((one for one in versions if one.version == model.version), None)
        if own is None:
            return False
        first = next(one for one in versions if one.lineage == own.lineage)
        return first.architecture != own.architecture

    async def read_manifest(self, version: int) -> Manifest:
        """Read the manifest of *version*; raises StoreError."""
        return await self._models.read_manifest(version)

    async def previous_champion(self) -> int:
        """Return the champion before this one; raises NoPreviousChampion."""
        present = await self._models.read_champion()
        if present is None or not present.before:
            raise NoPreviousChampion(
                "there is no champion before this one to roll back to: see fedbus model ls"
            )
        return present.before[0]

    # --- new versions -----------------------------------------------------------------------------

    async def publish_first(
        self, artifact: Artifact, *, code_version: str, new_lineage: bool = False
    ) -> Manifest:
        """Publish the first version of the task, or of a new lineage; raises StoreError."""
        versions = await self._models.list_versions()
        lineage = max((one.lineage for one in versions), default=0)
        if versions and not new_lineage:
            return versions[-1]  # published by a manager that stopped before it was promoted
        manifest = Manifest(
            **artifact.model_dump(include=set(Artifact.model_fields)),
            version=versions[-1].version + 1 if versions else 1,
            task=self._task,
            created=clock.now(),
            code_version=code_version,
            lineage=lineage + 1,
        )
        return await self._models.publish(self._sign(manifest))

    async def publish(self, run: ServerPublishing) -> Manifest:
        """Publish the result of *run* as the next version, or find the version that was published before a restart.

        Raises StoreError.
        """
        latest = await self._models.read_latest()
        if latest is not None and (latest.run, latest.sha256) == (run.run, run.result.sha256):
            return latest  # the run of another server may have the same name, but not the same weights
        parent = await self._models.read_manifest(run.base.version)
        last = run.last
        manifest = Manifest(
            **run.result.model_dump(include=set(Artifact.model_fields)),
            version=latest.version + 1 if latest else 1,
            task=self._task,
            created=clock.now(),
            parent=parent.version,
            lineage=parent.lineage,
            run=run.run,
            rounds=run.round,
            participants=last.participants if last else {},
            metrics=last.metrics if last else {},
            evaluation_failure=last.evaluation_failure if last else "",
            config=run.plan.config,
            code_version=run.code_version,
        )
        attributes: dict[str, str | int] = {"fedbus.model.version": manifest.version}
        with tracer.start_as_current_span("store", attributes=attributes | {"fedbus.run": run.run}):
            return await self._models.publish(self._sign(manifest))

    def _sign(self, manifest: Manifest) -> Manifest:
        return self._signer.sign(manifest) if self._signer else manifest

    async def judge(self, table: TaskTable, candidate: Manifest, run: ServerPublishing) -> PromotionVerdict:
        """Decide whether *candidate*, the result of *run*, replaces the champion automatically; raises StoreError."""
        if candidate.version == run.model.version:
            return PromotionVerdict(promote=True, reason="it is the champion already")
        if run.base.version != run.model.version:
            return PromotionVerdict(
                promote=False,
                was_compared=False,
                reason=f"its base is version {run.base.version}, but the champion is version {run.model.version} now. "
                f"To promote it anyway: fedbus model promote {candidate.version}",
            )
        served = await self._models.read_manifest(run.model.version)
        return judge_candidate(
            table.gate, candidate.metrics, served.metrics, evaluation_failure=candidate.evaluation_failure
        )

    # --- the offer ----------------------------------------------------------------------------------

    async def offer(self, model: ModelRef, *, receivers: int) -> BlobRef:
        """Offer *model* to all clients; concurrent fetches share one transfer. Raises StoreError."""
        path = await self.local_path(model)
        previous = self._offer
        self._offer = await self._bus.blobs.offer(path, receivers=max(1, receivers), sha256=model.sha256)
        if previous is not None:
            previous.release()
        return self._offer.ref

    async def local_path(self, artifact: Artifact) -> Path:
        """Return the local file with these weights; raises StoreError."""
        return await self._models.local_path(artifact.sha256)

    def withdraw(self) -> None:
        """End the offer."""
        if self._offer is not None:
            self._offer.release()

    async def retire(self, spare: frozenset[str], keep: int) -> None:
        """Delete old versions; an error is logged, and the next run tries again.

        Args:
            spare: Digests of weights that must stay.
            keep: How many versions stay at least.

        """
        try:
            deleted = await self._models.retire(keep=keep, spare=set(spare))
        except StoreError as error:
            log.warning("Cannot delete old model versions", reason=str(error))
        else:
            if deleted:
                log.info("Old model versions deleted", count=len(deleted))


async def wait_for_store(request: Callable[[], Awaitable[T]]) -> T:
    """Retry *request* until the store is available; raises every other StoreError."""

    def report(error: Exception, attempt: int) -> None:
        if attempt == 0:
            log.warning("Model store unavailable; retrying", reason=str(error))

    return await retry(request, on=StoreUnavailable, on_failure=report)
