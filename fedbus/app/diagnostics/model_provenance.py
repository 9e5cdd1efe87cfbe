"""Where a run's model came from, as far as it can still be known: read off the bus, the models and the code.

The log says who was asked and who answered with which bytes; the repository holds what came of it. Each check
reads what is at rest anew, and what it finds is a `Finding`: see `fedbus.domain.provenance`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Final

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.app.bus_session import transition_of
from fedbus.app.composition.initial_code import code_address, code_from_settings
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.views.event_replay import CLOCK_RESOLUTION, is_about_run
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.champion import Champion
from fedbus.contracts.client import ClientJoined, RoundReply
from fedbus.contracts.code import CODE, CodeData
from fedbus.contracts.message import Message
from fedbus.contracts.model import Artifact, Manifest, ModelRef
from fedbus.contracts.run import RUN, RoundResult, RunData, RunState
from fedbus.contracts.server import SERVER, RoundMessage, ServerData
from fedbus.contracts.transition import Transition
from fedbus.domain import provenance
from fedbus.domain.provenance import CheckOutcome, ClientUpdate, ProvenanceFinding, make_finding
from fedbus.learning import weights
from fedbus.stores.code.address import is_address
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    GitNotInstalled,
    InvalidCodeSource,
    short_version,
)
from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.open import ArtifactMissing, ArtifactRetired, ModelStore, VersionMissing
from fedbus.stores.models.signing import (
    SignatureInvalid,
    SignatureMissing,
    TrustedKeys,
    compute_manifest_digest,
)
from fedbus.stores.tasks.task_directory import TaskInvalid

FIRST_EVENT_TIMEOUT_S: Final = 2.0
"""How long the oldest event that is kept may take to come."""
NO_TRUSTED_KEYS: Final = (
    "whose signature is to be believed is not said: name the public keys in FEDBUS_TRUSTED_KEYS"
)


# --- what the bus keeps ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RunLog:
    """What the log tells of a run."""

    last_transition: Transition
    since: datetime
    """When it came to the state that it is in."""
    transitions: Sequence[Transition]
    messages: Sequence[Message]
    base_model: ModelRef | None
    """The version that it began with, as the server said."""
    code_source: str
    """Where the server has its code from."""
    log_begins: datetime | None
    """Where the log begins, if that is after the run did."""

    @property
    def facts(self) -> RunData:
        assert isinstance(self.last_transition.facts, RunData)
        return self.last_transition.facts

    @cached_property
    def rounds(self) -> list[RoundResult]:
        return provenance.all_rounds(self.facts, self.transitions)

    @cached_property
    def updates(self) -> list[ClientUpdate]:
        return provenance.collect_updates(self.messages)


async def load_run_log(bus: Bus, run: str, *, read: Callable[[str], None] = lambda _: None) -> RunLog:
    """All that the bus keeps of *run*; raises Failure where it knows of none. *read* hears whose update was read."""
    last = await bus.last_on_subject(subjects.lifecycle(bus.fed, RUN.kind, run))
    if last is None:
        raise CliError(f"no run {run} in federation {bus.fed}: see fedbus run ls", ExitCode.NOT_FOUND)
    move = transition_of(last)
    assert isinstance(move.facts, RunData)
    since = move.facts.requested_at - CLOCK_RESOLUTION
    life, events = lifecycle_stream(bus.fed), events_stream(bus.fed)
    moves = await _read_since(bus, life, subjects.lifecycle(bus.fed, RUN.kind, run), since)
    of_server = await _read_since(bus, life, subjects.lifecycle(bus.fed, SERVER.kind, move.task), since)
    said = [
        one
        for kind in (RoundMessage, RoundReply, ClientJoined)  # one at a time, see _since
        for one in await _read_since(
            bus, events, subjects.wildcard_for(bus.fed, kind, task=move.task), since, read
        )
        if is_about_run(run, one)
    ]
    code = await bus.last_on_subject(subjects.lifecycle(bus.fed, CODE.kind, move.task))
    return RunLog(
        last_transition=move,
        since=last.envelope.time,
        transitions=[transition_of(one) for one in moves],
        messages=[one.message for one in said],
        base_model=next(
            _base_models([transition_of(one) for one in of_server if is_about_run(run, one)]), None
        ),
        code_source=_code_source(transition_of(code)) if code else "",
        log_begins=await _log_begin(bus, since),
    )


async def _read_since(
    bus: Bus,
    stream: str,
    subject: str,
    since: datetime,
    read: Callable[[str], None] = lambda _: None,
) -> list[StoredMessage]:
    """What *stream* holds of one subject since then.

    One at a time: nats-server 2.15.1 leaves messages out where a start time meets many filters.
    """
    newest = [one for one in await bus.last_per_subject(stream, [subject]) if one.envelope.time >= since]
    found: list[StoredMessage] = []
    if newest:
        last = max(one.sequence for one in newest)
        async with bus.read_stream(stream, [subject], since=since) as held:
            async for seen in held:
                found.append(seen)
                if isinstance(seen.message, RoundReply):
                    read(f"what {seen.message.client} answered in round {seen.message.round}")
                if seen.sequence >= last:
                    break
    return found


def _base_models(lives: Sequence[Transition]) -> Iterator[ModelRef]:
    for one in lives:
        if isinstance(one.facts, ServerData) and one.facts.base is not None:
            yield one.facts.base


def _code_source(move: Transition) -> str:
    assert isinstance(move.facts, CodeData)
    return move.facts.source


async def _log_begin(bus: Bus, requested: datetime) -> datetime | None:
    """When the events begin that are kept, where that is after *requested*; None where nothing is lacking."""
    stream = events_stream(bus.fed)
    first, last = await bus.sequence_range(stream)
    if first <= 1 <= last:
        return None
    async with bus.read_stream(stream, stream_subjects(bus.fed), whole=True) as seen:
        begins = await _first_time(seen) if first <= last else None
    if begins is None:
        return datetime.now(requested.tzinfo)
    return begins if begins > requested else None


async def _first_time(seen: AsyncIterator[object]) -> datetime | None:
    try:
        one = await wait_within(FIRST_EVENT_TIMEOUT_S, anext(seen))
    except TimeoutError:
        return None
    time: datetime = one.envelope.time  # type: ignore[attr-defined]
    return time


# --- what the repository keeps ---------------------------------------------------------------------


@dataclass(frozen=True)
class StoredVersion:
    """A version of the model, and all that could be read of the others."""

    manifest: Manifest
    manifests: dict[int, Manifest]
    unreadable: dict[int, str] = field(default_factory=dict)


async def load_stored_version(models: ModelStore, version: int) -> StoredVersion | str:
    """What the repository has of *version*, or why it has nothing that can be used."""
    unreadable: dict[int, str] = {}
    try:
        known = {one.version: one for one in await models.list_versions()}
    except StoreCorrupt:
        known, unreadable = await _read_each_manifest(models)
    if version in known:
        return StoredVersion(known[version], known, unreadable)
    there = sorted({*known, *unreadable})
    return unreadable.get(version) or str(VersionMissing(version, there))


async def load_champion(models: ModelStore) -> Champion | None:
    """The version that is served; None also where its pointer cannot be read: `fedbus model verify` tells of that."""
    try:
        return await models.read_champion()
    except StoreCorrupt:
        return None


async def _read_each_manifest(models: ModelStore) -> tuple[dict[int, Manifest], dict[int, str]]:
    known: dict[int, Manifest] = {}
    unreadable: dict[int, str] = {}
    for number in await models.list_version_numbers():
        try:
            known[number] = await models.read_manifest(number)
        except StoreCorrupt as error:
            unreadable[number] = str(error)
    return known, unreadable


# --- what is checked -------------------------------------------------------------------------------


def check_run(told: RunLog) -> Iterator[ProvenanceFinding]:
    """What the log alone can answer: the run, its configuration, its rounds, its clients and their updates."""
    facts, moves = told.facts, told.transitions
    how = f"{told.last_transition.target}, after {len(moves)} transitions that the table allows"
    yield make_finding("run", how, provenance.lifecycle_violations(moves))
    done = [one for one in told.rounds if one.round > 0]
    clients = sorted({client for one in done for client in one.participants})
    yield make_finding(
        "clients",
        f"{_name_clients(clients)}, all of them with the code of the run",
        provenance.code_mismatches(facts, told.messages),
    )
    yield _check_updates(told)


def _check_updates(told: RunLog) -> ProvenanceFinding:
    wanting = list(provenance.missing_updates(told.rounds, told.updates))
    came = sum(not one.error for one in told.updates)
    if told.log_begins is not None:
        begins = f"{told.log_begins:%Y-%m-%d %H:%M} UTC"
        says = f"the log keeps {came}; it goes back to {begins} only, when the run was under way or over"
        return ProvenanceFinding("updates", CheckOutcome.UNCHECKED, says)
    return make_finding("updates", f"{came}, one from each client of each round, by their digests", wanting)


async def check_version(
    models: ModelStore, told: RunLog, kept: StoredVersion, trusted: TrustedKeys | None
) -> AsyncIterator[ProvenanceFinding]:
    """The version that the run came to: its manifest, its bytes, its signature, and what it was made from."""
    manifest = kept.manifest
    last = told.rounds[-1] if told.rounds else None
    yield make_finding(
        "manifest",
        f"version {manifest.version} of {manifest.task}, as the log tells of it",
        provenance.manifest_mismatches(manifest, told.facts, last),
    )
    for one in await _check_bytes(models, manifest):
        yield one
    yield _check_signature(manifest, trusted)
    yield await _check_base_model(models, told.base_model)
    yield _check_ancestry(told, kept, trusted)
    config = ", ".join(f"{name}={value}" for name, value in manifest.config.items())
    plan = told.facts.plan
    yield make_finding(
        "configuration",
        f"{plan.rounds} rounds, quorum {plan.quorum}, {config or 'nothing of the app overridden'}",
        provenance.config_mismatches(manifest, told.facts),
    )


async def _check_base_model(models: ModelStore, base: ModelRef | None) -> ProvenanceFinding:
    """The digest of what the run began with, taken anew: of spoilt weights nothing good can have come."""
    about = "began with"
    if base is None:
        return ProvenanceFinding(
            about, CheckOutcome.UNCHECKED, "the log no longer keeps what the server said of it"
        )
    try:
        await models.verify(base.sha256)
    except ArtifactRetired as error:
        return ProvenanceFinding(about, CheckOutcome.UNCHECKED, f"v{base.version}; {error}")
    except (ArtifactMissing, StoreCorrupt) as error:
        return ProvenanceFinding(about, CheckOutcome.MISMATCH, f"v{base.version}; {error}")
    return ProvenanceFinding(
        about, CheckOutcome.MATCH, f"v{base.version}, {_describe_bytes(base)}, the digest taken anew"
    )


def _describe_bytes(artifact: Artifact) -> str:
    return f"{artifact.sha256[:12]}, {artifact.size_bytes} bytes"


async def _check_bytes(models: ModelStore, manifest: Manifest) -> list[ProvenanceFinding]:
    """The digest of what is at rest, taken anew, and the architecture of what it holds."""
    try:
        await models.verify(manifest.sha256)
        path = await models.local_path(manifest.sha256)
    except ArtifactRetired as error:
        return [
            ProvenanceFinding(about, CheckOutcome.UNCHECKED, str(error))
            for about in ("weights", "architecture")
        ]
    except (ArtifactMissing, StoreCorrupt) as error:
        return [ProvenanceFinding("weights", CheckOutcome.MISMATCH, str(error))]
    size = path.stat().st_size
    wrong = [f"there are {size} bytes, the manifest says {manifest.size_bytes}"]
    content = make_finding(
        "weights",
        f"{_describe_bytes(manifest)}, the digest taken anew",
        wrong if size != manifest.size_bytes else (),
    )
    return [content, await asyncio.to_thread(_check_architecture, path, manifest)]


def _check_architecture(path: Path, manifest: Manifest) -> ProvenanceFinding:
    try:
        arrays = weights.load(path)
    except weights.BadWeights as error:
        return ProvenanceFinding("architecture", CheckOutcome.MISMATCH, str(error))
    found = weights.architecture_digest(arrays)
    wrong = [f"the weights are of the architecture {found}, the manifest says {manifest.architecture}"]
    says = f"{len(arrays)} tensors, {sum(one.size for one in arrays.values()):,} numbers"
    return make_finding("architecture", says, wrong if found != manifest.architecture else ())


def _check_signature(manifest: Manifest, trusted: TrustedKeys | None) -> ProvenanceFinding:
    if trusted is not None:
        try:
            checked = trusted.verify_manifest(manifest)
        except (SignatureMissing, SignatureInvalid) as error:
            return ProvenanceFinding("signature", CheckOutcome.MISMATCH, str(error))
        return ProvenanceFinding(
            "signature", CheckOutcome.MATCH, f"by the key {checked.key}, which is trusted here"
        )
    seal = manifest.seal
    if seal is None:
        return ProvenanceFinding("signature", CheckOutcome.UNCHECKED, "there is none")
    if seal.manifest != compute_manifest_digest(manifest):
        return ProvenanceFinding(
            "signature", CheckOutcome.MISMATCH, "the manifest was changed after it was signed"
        )
    return ProvenanceFinding("signature", CheckOutcome.UNCHECKED, f"by the key {seal.key}; {NO_TRUSTED_KEYS}")


def _check_ancestry(told: RunLog, kept: StoredVersion, trusted: TrustedKeys | None) -> ProvenanceFinding:
    manifest = kept.manifest
    line, broken = provenance.trace_ancestry(manifest, kept.manifests)
    wrong = [broken] if broken else []
    if told.base_model is not None and told.base_model.version != manifest.parent:
        wrong.append(
            f"the run began with version {told.base_model.version}, the manifest says {manifest.parent}"
        )
    if told.base_model is not None and line and line[0].ref != told.base_model:
        wrong.append(f"version {line[0].version} is not the one that the run began with")
    unsigned: list[str] = []
    for one in line if trusted else ():
        assert trusted is not None
        try:
            trusted.verify_manifest(one)
        except SignatureMissing:
            unsigned.append(f"v{one.version}")
        except SignatureInvalid as error:
            wrong.append(str(error))
    says = ", ".join(f"v{one.version}" for one in line) or "nothing"
    if line and not broken:
        says += f", the first of lineage {line[-1].lineage}"
    if unsigned and not wrong:
        return ProvenanceFinding(
            "made from", CheckOutcome.UNCHECKED, f"{says}; not signed: {', '.join(unsigned)}"
        )
    return make_finding("made from", says, wrong)


async def check_code(
    told: RunLog, manifest: Manifest | None, repo: str, settings: Settings
) -> ProvenanceFinding:
    """Whether the code is what the version says, and its commit one that may be run."""
    version = told.facts.code_version
    if manifest is not None and manifest.code_version != version:
        wrong = f"the run was trained with {version or 'no code'}, the manifest says {manifest.code_version}"
        return ProvenanceFinding("code", CheckOutcome.MISMATCH, wrong)
    try:
        code = _open_repository(told, repo, settings)
    except (InvalidCodeSource, GitNotInstalled) as error:
        if repo:
            raise
        return ProvenanceFinding("code", CheckOutcome.UNCHECKED, f"{short_version(version)}; {error}")
    if code is None:
        return ProvenanceFinding(
            "code", CheckOutcome.UNCHECKED, f"{short_version(version)}; name its repository with --repo"
        )
    return await _check_commit(code, version)


def _open_repository(told: RunLog, repo: str, settings: Settings) -> CodeRepository | None:
    """The one that was named, else the one that the server follows; None where neither can be found here."""
    if repo or is_address(settings.task) or is_address(told.code_source):
        return code_from_settings(settings, repo or code_address(settings, told.code_source))
    return (
        code_from_settings(settings, told.code_source)
        if told.code_source and Path(told.code_source).is_dir()
        else None
    )


async def _check_commit(code: CodeRepository, version: str) -> ProvenanceFinding:
    name = short_version(version)
    try:
        await code.verify(version)
    except CodeUnavailable as error:
        return ProvenanceFinding("code", CheckOutcome.UNCHECKED, f"{name}; {error}")
    except (CodeRejected, TaskInvalid) as error:
        if code.can_update:
            return ProvenanceFinding("code", CheckOutcome.MISMATCH, str(error))
        return ProvenanceFinding(
            "code",
            CheckOutcome.UNCHECKED,
            f"{name}; {code.source} is a directory, and holds another version now",
        )
    if not code.can_update:
        return ProvenanceFinding("code", CheckOutcome.MATCH, f"{name}, which {code.source} still holds")
    if not code.requires_signatures:
        unsaid = "who may sign it is not said: FEDBUS_ALLOWED_SIGNERS"
        return ProvenanceFinding(
            "code", CheckOutcome.UNCHECKED, f"{name}, on the history of {code.source}; {unsaid}"
        )
    return ProvenanceFinding(
        "code", CheckOutcome.MATCH, f"{name}, of an allowed signer, on the history of {code.source}"
    )


def missing_version_finding(told: RunLog) -> ProvenanceFinding:
    """A run that has no version to show."""
    reason = f": {told.last_transition.reason}" if told.last_transition.reason else ""
    over = told.last_transition.target in RUN.final and told.last_transition.target != RunState.FINISHED
    says = f"the run made no version, it is {told.last_transition.target}{reason}"
    return ProvenanceFinding("manifest", CheckOutcome.MISMATCH if over else CheckOutcome.UNCHECKED, says)


def _name_clients(clients: Sequence[str], most: int = 8) -> str:
    if not clients:
        return "none"
    more = f" and {len(clients) - most} more" if len(clients) > most else ""
    return f"{len(clients)}: {', '.join(clients[:most])}{more}"
