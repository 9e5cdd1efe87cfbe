"""The provenance of a run's model: read the log, the model repository and the code repository, and compare them.

The log contains the messages of the run and the digests of its updates; the repository contains the result. Each check
reads the stored files again and returns a `ProvenanceFinding`: see `fedbus.domain.provenance`.
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
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.champion import Champion
from fedbus.contracts.client import ClientJoined, RoundReply
from fedbus.contracts.code import CODE, CodeData
from fedbus.contracts.message import Message
from fedbus.contracts.model import Artifact, Manifest, ModelRef
from fedbus.contracts.round_messages import RoundMessage
from fedbus.contracts.run import RUN, RoundResult, RunData, RunState
from fedbus.contracts.server import SERVER, ServerData
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
"""The wait for the oldest event of the stream."""
NO_TRUSTED_KEYS: Final = "no key is trusted here: set FEDBUS_TRUSTED_KEYS to the public keys"


# --- the log ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RunLog:
    """The messages of a run."""

    last_transition: Transition
    since: datetime
    """When the run entered its current state."""
    transitions: Sequence[Transition]
    messages: Sequence[Message]
    base_model: ModelRef | None
    """The version that the run started from, according to the server."""
    code_source: str
    """The code repository of the server."""
    log_begins: datetime | None
    """The time of the oldest event; None if the log contains the whole run."""

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
    """Read all messages of *run*.

    Args:
        bus: The federation.
        run: The run.
        read: Called with a description of each reply that was read.

    Raises:
        CliError: There is no such run.

    """
    last = await bus.last_on_subject(subjects.lifecycle(bus.fed, RUN.kind, run))
    if last is None:
        raise CliError(f"no run {run} in federation {bus.fed}: see fedbus run ls", ExitCode.NOT_FOUND)
    transition = transition_of(last)
    assert isinstance(transition.facts, RunData)
    since = transition.facts.requested_at - CLOCK_RESOLUTION
    life, events = lifecycle_stream(bus.fed), events_stream(bus.fed)
    transitions = await _read_since(bus, life, subjects.lifecycle(bus.fed, RUN.kind, run), since)
    of_server = await _read_since(bus, life, subjects.lifecycle(bus.fed, SERVER.kind, transition.task), since)
    messages = [
        one
        for kind in (RoundMessage, RoundReply, ClientJoined)  # one at a time, see _read_since
        for one in await _read_since(
            bus, events, subjects.wildcard_for(bus.fed, kind, task=transition.task), since, read
        )
        if is_about_run(run, one)
    ]
    code = await bus.last_on_subject(subjects.lifecycle(bus.fed, CODE.kind, transition.task))
    return RunLog(
        last_transition=transition,
        since=last.envelope.time,
        transitions=[transition_of(one) for one in transitions],
        messages=[one.message for one in messages],
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
    """Read the messages of one subject since a time.

    Only one subject, because nats-server 2.15.1 omits messages if a consumer has a start time and several filters.
    """
    newest = [one for one in await bus.last_per_subject(stream, [subject]) if one.envelope.time >= since]
    found: list[StoredMessage] = []
    if newest:
        last = max(one.sequence for one in newest)
        async with bus.read_stream(stream, [subject], since=since) as messages:
            async for stored in messages:
                found.append(stored)
                if isinstance(stored.message, RoundReply):
                    read(f"reply of {stored.message.client} in round {stored.message.round}")
                if stored.sequence >= last:
                    break
    return found


def _base_models(transitions: Sequence[Transition]) -> Iterator[ModelRef]:
    for one in transitions:
        if isinstance(one.facts, ServerData) and one.facts.base is not None:
            yield one.facts.base


def _code_source(transition: Transition) -> str:
    assert isinstance(transition.facts, CodeData)
    return transition.facts.source


async def _log_begin(bus: Bus, requested: datetime) -> datetime | None:
    """Return the time of the oldest event if it is after *requested*; None if the log contains the whole run."""
    stream = events_stream(bus.fed)
    first, last = await bus.sequence_range(stream)
    if first <= 1 <= last:
        return None
    async with bus.read_stream(stream, stream_subjects(bus.fed), whole=True) as messages:
        begin = await _first_time(messages) if first <= last else None
    if begin is None:
        return datetime.now(requested.tzinfo)
    return begin if begin > requested else None


async def _first_time(messages: AsyncIterator[StoredMessage]) -> datetime | None:
    try:
        first = await wait_within(FIRST_EVENT_TIMEOUT_S, anext(messages))
    except TimeoutError:
        return None
    return first.envelope.time


# --- the model repository ---------------------------------------------------------------------


@dataclass(frozen=True)
class StoredVersion:
    """The manifest of a version, and those of all other versions that could be read."""

    manifest: Manifest
    manifests: dict[int, Manifest]
    unreadable: dict[int, str] = field(default_factory=dict)


async def load_stored_version(models: ModelStore, version: int) -> StoredVersion | str:
    """Load the manifest of *version*; return the reason as text if it cannot be used."""
    unreadable: dict[int, str] = {}
    try:
        known = {one.version: one for one in await models.list_versions()}
    except StoreCorrupt:
        known, unreadable = await _read_each_manifest(models)
    if version in known:
        return StoredVersion(known[version], known, unreadable)
    existing = sorted({*known, *unreadable})
    return unreadable.get(version) or str(VersionMissing(version, existing))


async def load_champion(models: ModelStore) -> Champion | None:
    """Load the champion. None if its pointer is corrupt, which `fedbus model verify` reports."""
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


# --- checks -------------------------------------------------------------------------------


def check_run(log: RunLog) -> Iterator[ProvenanceFinding]:
    """Check what the log alone contains: the run, its clients and their updates."""
    facts, transitions = log.facts, log.transitions
    text = f"{log.last_transition.target}, after {len(transitions)} legal transitions"
    yield make_finding("run", text, provenance.lifecycle_violations(transitions))
    done = [one for one in log.rounds if one.round > 0]
    clients = sorted({client for one in done for client in one.participants})
    yield make_finding(
        "clients",
        f"{_name_clients(clients)}, all with the code of the run",
        provenance.code_mismatches(facts, log.messages),
    )
    yield _check_updates(log)


def _check_updates(log: RunLog) -> ProvenanceFinding:
    missing = list(provenance.missing_updates(log.rounds, log.updates))
    count = sum(not one.error for one in log.updates)
    if log.log_begins is not None:
        begin = f"{log.log_begins:%Y-%m-%d %H:%M} UTC"
        text = f"the log has {count}; it starts at {begin}, after the start of the run"
        return ProvenanceFinding("updates", CheckOutcome.UNCHECKED, text)
    return make_finding("updates", f"{count}, one from each client of each round, by their digests", missing)


async def check_version(
    models: ModelStore, log: RunLog, stored: StoredVersion, trusted: TrustedKeys | None
) -> AsyncIterator[ProvenanceFinding]:
    """Check the version that the run made: its manifest, weights, signature, ancestors and configuration."""
    manifest = stored.manifest
    last = log.rounds[-1] if log.rounds else None
    yield make_finding(
        "manifest",
        f"version {manifest.version} of {manifest.task}, as in the log",
        provenance.manifest_mismatches(manifest, log.facts, last),
    )
    for one in await _check_bytes(models, manifest):
        yield one
    yield _check_signature(manifest, trusted)
    yield await _check_base_model(models, log.base_model)
    yield _check_ancestry(log, stored, trusted)
    config = ", ".join(f"{name}={value}" for name, value in manifest.config.items())
    plan = log.facts.plan
    yield make_finding(
        "configuration",
        f"{f'{plan.rounds} rounds' if plan.rounds else 'the rounds of the app'}, quorum {plan.quorum}, "
        f"{config or 'no overrides of the app'}",
        provenance.config_mismatches(manifest, log.facts),
    )


async def _check_base_model(models: ModelStore, base: ModelRef | None) -> ProvenanceFinding:
    """Compute the digest of the weights that the run started from."""
    about = "began with"
    if base is None:
        return ProvenanceFinding(
            about, CheckOutcome.UNCHECKED, "the log no longer contains the server's transition"
        )
    try:
        await models.verify(base.sha256)
    except ArtifactRetired as error:
        return ProvenanceFinding(about, CheckOutcome.UNCHECKED, f"v{base.version}; {error}")
    except (ArtifactMissing, StoreCorrupt) as error:
        return ProvenanceFinding(about, CheckOutcome.MISMATCH, f"v{base.version}; {error}")
    return ProvenanceFinding(
        about, CheckOutcome.MATCH, f"v{base.version}, {_describe_bytes(base)}, the digest is correct"
    )


def _describe_bytes(artifact: Artifact) -> str:
    return f"{artifact.sha256[:12]}, {artifact.size_bytes} bytes"


async def _check_bytes(models: ModelStore, manifest: Manifest) -> list[ProvenanceFinding]:
    """Compute the digest and the architecture of the stored weights."""
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
    wrong = [f"the file has {size} bytes, the manifest names {manifest.size_bytes}"]
    content = make_finding(
        "weights",
        f"{_describe_bytes(manifest)}, the digest is correct",
        wrong if size != manifest.size_bytes else (),
    )
    return [content, await asyncio.to_thread(_check_architecture, path, manifest)]


def _check_architecture(path: Path, manifest: Manifest) -> ProvenanceFinding:
    try:
        arrays = weights.load(path)
    except weights.BadWeights as error:
        return ProvenanceFinding("architecture", CheckOutcome.MISMATCH, str(error))
    found = weights.architecture_digest(arrays)
    wrong = [f"the weights have the architecture {found}, the manifest names {manifest.architecture}"]
    text = f"{len(arrays)} tensors, {sum(one.size for one in arrays.values()):,} numbers"
    return make_finding("architecture", text, wrong if found != manifest.architecture else ())


def _check_signature(manifest: Manifest, trusted: TrustedKeys | None) -> ProvenanceFinding:
    if trusted is not None:
        try:
            checked = trusted.verify_manifest(manifest)
        except (SignatureMissing, SignatureInvalid) as error:
            return ProvenanceFinding("signature", CheckOutcome.MISMATCH, str(error))
        return ProvenanceFinding("signature", CheckOutcome.MATCH, f"by the trusted key {checked.key}")
    seal = manifest.seal
    if seal is None:
        return ProvenanceFinding("signature", CheckOutcome.UNCHECKED, "not signed")
    if seal.manifest != compute_manifest_digest(manifest):
        return ProvenanceFinding(
            "signature", CheckOutcome.MISMATCH, "the manifest was changed after it was signed"
        )
    return ProvenanceFinding("signature", CheckOutcome.UNCHECKED, f"by the key {seal.key}; {NO_TRUSTED_KEYS}")


def _check_ancestry(log: RunLog, stored: StoredVersion, trusted: TrustedKeys | None) -> ProvenanceFinding:
    manifest = stored.manifest
    line, broken = provenance.trace_ancestry(manifest, stored.manifests)
    wrong = [broken] if broken else []
    if log.base_model is not None and log.base_model.version != manifest.parent:
        wrong.append(
            f"the run started from version {log.base_model.version}, the manifest names {manifest.parent}"
        )
    if log.base_model is not None and line and line[0].ref != log.base_model:
        wrong.append(f"version {line[0].version} is not the model that the run started from")
    unsigned: list[str] = []
    for one in line:
        if trusted is None:
            break
        try:
            trusted.verify_manifest(one)
        except SignatureMissing:
            unsigned.append(f"v{one.version}")
        except SignatureInvalid as error:
            wrong.append(str(error))
    text = ", ".join(f"v{one.version}" for one in line) or "nothing"
    if line and not broken:
        text += f", the first of lineage {line[-1].lineage}"
    if unsigned and not wrong:
        return ProvenanceFinding(
            "made from", CheckOutcome.UNCHECKED, f"{text}; not signed: {', '.join(unsigned)}"
        )
    return make_finding("made from", text, wrong)


async def check_code(
    log: RunLog, manifest: Manifest | None, repo: str, settings: Settings
) -> ProvenanceFinding:
    """Check that the code of the run is that of the manifest, and that its commit is valid."""
    version = log.facts.code_version
    if manifest is not None and manifest.code_version != version:
        wrong = f"the run was trained with {version or 'no code'}, the manifest names {manifest.code_version}"
        return ProvenanceFinding("code", CheckOutcome.MISMATCH, wrong)
    try:
        code = _open_repository(log, repo, settings)
    except (InvalidCodeSource, GitNotInstalled) as error:
        if repo:
            raise
        return ProvenanceFinding("code", CheckOutcome.UNCHECKED, f"{short_version(version)}; {error}")
    if code is None:
        return ProvenanceFinding(
            "code", CheckOutcome.UNCHECKED, f"{short_version(version)}; name its repository with --repo"
        )
    return await _check_commit(code, version)


def _open_repository(log: RunLog, repo: str, settings: Settings) -> CodeRepository | None:
    """Open the repository *repo*, or else that of the server; None if this machine cannot access either."""
    if repo or is_address(settings.task) or is_address(log.code_source):
        return code_from_settings(settings, repo or code_address(settings, log.code_source))
    return (
        code_from_settings(settings, log.code_source)
        if log.code_source and Path(log.code_source).is_dir()
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
            f"{name}; the directory {code.source} now contains another version",
        )
    if not code.can_update:
        return ProvenanceFinding("code", CheckOutcome.MATCH, f"{name}, the present content of {code.source}")
    if not code.requires_signatures:
        advice = "to check its signature, set FEDBUS_ALLOWED_SIGNERS"
        return ProvenanceFinding(
            "code", CheckOutcome.UNCHECKED, f"{name}, in the history of {code.source}; {advice}"
        )
    return ProvenanceFinding(
        "code", CheckOutcome.MATCH, f"{name}, by an allowed signer, in the history of {code.source}"
    )


def missing_version_finding(log: RunLog) -> ProvenanceFinding:
    """Return the finding of a run that has made no version."""
    reason = f": {log.last_transition.reason}" if log.last_transition.reason else ""
    state = log.last_transition.target
    has_failed = state in RUN.final and state != RunState.FINISHED
    text = f"the run made no version, it is {state}{reason}"
    return ProvenanceFinding(
        "manifest", CheckOutcome.MISMATCH if has_failed else CheckOutcome.UNCHECKED, text
    )


def _name_clients(clients: Sequence[str], limit: int = 8) -> str:
    if not clients:
        return "none"
    more = f" and {len(clients) - limit} more" if len(clients) > limit else ""
    return f"{len(clients)}: {', '.join(clients[:limit])}{more}"
