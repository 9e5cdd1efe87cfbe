"""Publishes the model of a simulation as a version of the task's repository, from which a fleet continues.

The rules are those of a run. The first version of an empty repository becomes the champion. A later one becomes it if
the task's gate accepts it; without that, `fedbus model promote` does. If the federation runs, its server manager
promotes the version, so that devices load it. Else the champion pointer moves by compare-and-set.

A version that began with a version of the repository (`--from`) is its child. Any other begins a lineage.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedbus.app.bus_session import connect_bus
from fedbus.app.failures import CliError
from fedbus.app.settings import Settings
from fedbus.bus.errors import BusUnreachable, NoResponse, RequestRefused
from fedbus.contracts.champion import Champion, PromoteModel
from fedbus.contracts.model import Manifest, SimulationOrigin
from fedbus.contracts.run import RoundResult, Scalar
from fedbus.contracts.task.task import GateTable, Task
from fedbus.domain.model_promotion import PromotionVerdict, judge_candidate
from fedbus.learning import weights
from fedbus.stores.models.open import ModelStore, VersionTaken

MAX_FORMER_CHAMPIONS: Final = 20
ANSWER_TIMEOUT_S: Final = 120.0
PUBLISH_ATTEMPTS: Final = 5
"""Attempts to take the next version number while runs of the federation publish too."""


@dataclass(frozen=True)
class SimulatedModel:
    """The model of a simulation, with what its manifest states."""

    file: Path
    simulation: str
    rounds: list[RoundResult]
    config: dict[str, Scalar]
    origin: SimulationOrigin
    parent: Manifest | None = None
    """The version that the simulation began with."""


@dataclass(frozen=True)
class PublishedModel:
    """The version, and whether it is the champion."""

    manifest: Manifest
    is_champion: bool
    reason: str

    @property
    def facts(self) -> dict[str, object]:
        return {
            "version": self.manifest.version,
            "sha256": self.manifest.sha256,
            "champion": self.is_champion,
            "reason": self.reason,
        }


async def publish(
    model: SimulatedModel, task: Task, models: ModelStore, settings: Settings, *, ask_server: bool
) -> PublishedModel:
    """Store *model*, publish it as the next version of *task*, and promote it if the task's gate accepts it.

    *ask_server*: a federation that uses this repository may run; then its server manager promotes the version.

    Raises:
        CliError: the repository is empty, and the model has diverged.
        StoreError: the repository cannot be used.
        BusError: the federation runs, and refused to promote the version.

    """
    await models.prepare()
    await _check_usable_as_first(model, models)
    manifest = await _publish_version(model, task, models, settings)
    champion = await models.read_champion()
    if champion is not None and champion.version == manifest.version:
        return PublishedModel(manifest, is_champion=True, reason=champion.reason)
    verdict = await _judge(manifest, champion, task, models)
    if not verdict.promote:
        return PublishedModel(manifest, is_champion=False, reason=verdict.reason)
    if ask_server and champion is not None and await _is_promoted_by_server(manifest, verdict, settings):
        return PublishedModel(manifest, is_champion=True, reason=verdict.reason)
    former = (champion.version, *champion.before) if champion else ()
    await models.set_champion(
        Champion(
            version=manifest.version,
            term=champion.term + 1 if champion else 1,
            before=tuple(dict.fromkeys(one for one in former if one != manifest.version))[
                :MAX_FORMER_CHAMPIONS
            ],
            since=datetime.now(UTC),
            reason=f"{model.simulation}: {verdict.reason}"[:500],
        )
    )
    return PublishedModel(manifest, is_champion=True, reason=verdict.reason)


async def _check_usable_as_first(model: SimulatedModel, models: ModelStore) -> None:
    """Refuse a diverged model in an empty repository, whose first version every device would serve."""
    metrics = model.rounds[-1].metrics if model.rounds else {}
    verdict = judge_candidate(GateTable(), metrics, {})
    if not verdict.promote and await models.read_latest() is None:
        raise CliError(
            f"the model is not published: {verdict.reason}, and the first version of a repository becomes the champion"
        )


async def _publish_version(
    model: SimulatedModel, task: Task, models: ModelStore, settings: Settings
) -> Manifest:
    """Publish the next version; the same model of the same simulation is published once."""
    packed = weights.pack(await asyncio.to_thread(weights.load, model.file))
    artifact = packed.artifact(await models.put(packed.buffers))
    signer = settings.load_signer()
    last = model.rounds[-1] if model.rounds else RoundResult(round=0)
    for attempt in range(PUBLISH_ATTEMPTS):
        versions = await models.list_versions()
        for version in versions:
            if (version.run, version.sha256) == (model.simulation, artifact.sha256):
                return version
        newest_lineage = max((one.lineage for one in versions), default=0)
        manifest = Manifest(
            **artifact.model_dump(),
            version=versions[-1].version + 1 if versions else 1,
            task=task.id,
            created=datetime.now(UTC),
            parent=model.parent.version if model.parent else None,
            lineage=model.parent.lineage if model.parent else newest_lineage + 1,
            run=model.simulation,
            rounds=last.round,
            participants=last.participants,
            metrics=last.metrics,
            evaluation_failure=last.evaluation_failure,
            config=model.config,
            code_version=task.code_version,
            simulation=model.origin,
        )
        try:
            return await models.publish(signer.sign(manifest) if signer else manifest)
        except VersionTaken:
            if attempt == PUBLISH_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


async def _judge(
    candidate: Manifest, champion: Champion | None, task: Task, models: ModelStore
) -> PromotionVerdict:
    if champion is None:
        return PromotionVerdict(promote=True, reason="the first version of the repository")
    served = await models.read_manifest(champion.version)
    if candidate.architecture != served.architecture:
        return PromotionVerdict(
            promote=False,
            reason=f"its architecture differs from that of the champion, version {champion.version}. "
            f"To promote it anyway: fedbus model promote {candidate.version}",
        )
    if candidate.parent is not None and candidate.parent != champion.version:
        return PromotionVerdict(
            promote=False,
            reason=f"it began with version {candidate.parent}, but the champion is version {champion.version} now. "
            f"To promote it anyway: fedbus model promote {candidate.version}",
        )
    return judge_candidate(
        task.table.gate,
        candidate.metrics,
        served.metrics,
        evaluation_failure=candidate.evaluation_failure,
    )


async def _is_promoted_by_server(manifest: Manifest, verdict: PromotionVerdict, settings: Settings) -> bool:
    """Ask the server manager to promote the version. Return False if no federation runs."""
    request = PromoteModel(
        task=manifest.task, model_version=manifest.version, reason=f"{manifest.run}: {verdict.reason}"[:500]
    )
    try:
        async with connect_bus(settings) as bus:
            await bus.request(request, timeout_s=ANSWER_TIMEOUT_S)
    except (BusUnreachable, NoResponse):
        return False
    except RequestRefused as error:
        raise _refused(manifest, error) from None
    return True


def _refused(manifest: Manifest, error: RequestRefused) -> RequestRefused:
    """Keep the refusal, and name the version, which is published."""
    error.args = (f"version {manifest.version} is published, but not promoted: {error}",)
    return error
