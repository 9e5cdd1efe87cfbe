"""Whether what the log tells of a run and what the repository keeps of its model are one story.

Who asks has read both; here they are laid side by side. Each check answers with what does not fit, in words,
and with nothing where all fits. What can no longer be told, because the log has dropped it or nobody named the
keys, is *open*: that is said, and is no accusation.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Final

from fedbus.contracts.client import ClientJoined, RoundReply
from fedbus.contracts.message import Message
from fedbus.contracts.model import BlobRef, Manifest
from fedbus.contracts.run import RoundResult, RunData, RunEvent
from fedbus.contracts.server import RoundMessage
from fedbus.contracts.transition import Transition

TRAIN_TYPE: Final = "train"
"""How the type of a Flower message begins whose answer is an update."""


class CheckOutcome(StrEnum):
    """What came of a check."""

    YES = "fits"
    OPEN = "not checked"
    NO = "does not fit"


@dataclass(frozen=True)
class ProvenanceFinding:
    """*about* what was looked at, what came of it, and in words what there is."""

    about: str
    fit: CheckOutcome
    says: str


@dataclass(frozen=True)
class ClientUpdate:
    """What a client answered when it was told to train: its bytes by their digest, or why there are none."""

    round: int | None
    client: str
    sha256: str
    size_bytes: int
    train_s: float
    error: str = ""


def make_finding(about: str, says: str, wrong: Iterable[str]) -> ProvenanceFinding:
    """*says* where nothing is *wrong*, else all that is."""
    complaints = list(wrong)
    return ProvenanceFinding(
        about, CheckOutcome.NO if complaints else CheckOutcome.YES, "; ".join(complaints) or says
    )


# --- the manifest ----------------------------------------------------------------------------------


def manifest_mismatches(manifest: Manifest, run: RunData, last: RoundResult | None) -> Iterator[str]:
    """Where the manifest tells another story than the log; *last* is the run's last round."""
    if manifest.run != run.run:
        yield f"version {manifest.version} says that it came of {manifest.run or 'no run'}"
    if manifest.task != run.task:
        yield f"version {manifest.version} says that it is of the task {manifest.task}"
    if run.model is not None and manifest.ref != run.model:
        yield (
            f"the log says that the run came to {_format_weights(run.model.sha256, run.model.size_bytes)}, "
            f"the manifest {_format_weights(manifest.sha256, manifest.size_bytes)}"
        )
    if last is not None:
        yield from _round_mismatches(manifest, last)


def _round_mismatches(manifest: Manifest, last: RoundResult) -> Iterator[str]:
    if manifest.rounds != last.round:
        yield f"the manifest counts {manifest.rounds} rounds, the log {last.round}"
    if dict(manifest.participants) != dict(last.participants):
        yield (
            f"the manifest says that {_format_clients(manifest.participants)} were in the last round, "
            f"the log {_format_clients(last.participants)}"
        )
    if _metrics_as_text(manifest.metrics) != _metrics_as_text(last.metrics):
        names = sorted(manifest.metrics.keys() | last.metrics.keys())
        other = [name for name in names if _metric_as_text(manifest, name) != _metric_as_text(last, name)]
        yield f"the manifest and the log differ in {', '.join(other)}"


def config_mismatches(manifest: Manifest, run: RunData) -> Iterator[str]:
    """Where the run was planned with another configuration than the manifest has."""
    for name in sorted(manifest.config.keys() | run.plan.config.keys()):
        theirs, ours = manifest.config.get(name), run.plan.config.get(name)
        if theirs != ours:
            yield f"{name} was planned as {ours!r} and the manifest has {theirs!r}"


def trace_ancestry(manifest: Manifest, known: Mapping[int, Manifest]) -> tuple[list[Manifest], str]:
    """The versions that *manifest* was made from, the nearest first, and what is wrong with that line.

    It should end at the first model of its lineage, which was made from nothing.
    """
    line: list[Manifest] = []
    child = manifest
    while child.parent is not None:
        parent = known.get(child.parent)
        if parent is None:
            return line, f"version {child.version} was made from version {child.parent}, which is not there"
        if parent.version >= child.version:
            return line, f"version {child.version} cannot have been made from version {parent.version}"
        line.append(parent)
        if parent.lineage != child.lineage:
            return (
                line,
                f"version {child.version} is of lineage {child.lineage}, its parent of {parent.lineage}",
            )
        child = parent
    return line, ""


# --- the log ---------------------------------------------------------------------------------------


def lifecycle_violations(moves: Sequence[Transition]) -> Iterator[str]:
    """Where the run's life in the log is not one that its table allows."""
    for before, after in pairwise(moves):
        if after.source != before.target:
            yield f"the log jumps from {before.target} to {after.source}"
    for move in moves:
        if move.source and not move.is_legal:
            yield f"no run goes from {move.source} to {move.target} by {move.event}"


def all_rounds(run: RunData, moves: Iterable[Transition]) -> list[RoundResult]:
    """All rounds, with who took part as the log has it: the facts alone forget that of old rounds.

    Of a round that came again, after its server was lost, the last.
    """
    found = {one.round: one for one in run.rounds}
    for move in moves:
        if move.event == RunEvent.ROUND_FINISHED and isinstance(move.facts, RunData) and move.facts.rounds:
            found[move.facts.rounds[-1].round] = move.facts.rounds[-1]
    return [found[number] for number in sorted(found)]


def code_mismatches(run: RunData, said: Iterable[Message]) -> Iterator[str]:
    """Clients that joined with another version of the code than the run has."""
    for client, version in sorted(
        {(one.client, one.code_version) for one in said if isinstance(one, ClientJoined)}
    ):
        if version not in ("", run.code_version):
            yield f"{client} joined with the code {version}"


def collect_updates(said: Iterable[Message]) -> list[ClientUpdate]:
    """The answers to what told clients to train, in the order in which they came."""
    asked: dict[str, RoundMessage] = {}
    found: list[ClientUpdate] = []
    for one in said:
        match one:
            case RoundMessage():
                asked[one.message_id] = one
            case RoundReply() if _is_update(asked.get(one.reply_to)):
                found.append(_update(one))
            case _:
                pass
    return found


def missing_updates(rounds: Iterable[RoundResult], updates: Collection[ClientUpdate]) -> Iterator[str]:
    """Clients that are said to have taken part in a round, and whose update the log does not have."""
    sent = {(one.round, one.client) for one in updates if not one.error}
    for result in rounds:
        absent = [
            client for client in result.participants if not {(result.round, client), (None, client)} & sent
        ]
        if absent:
            yield f"the log has no update of {_format_clients(absent)} in round {result.round}"


def _is_update(asked: RoundMessage | None) -> bool:
    return asked is not None and asked.message_type.partition(".")[0] == TRAIN_TYPE


def _update(reply: RoundReply) -> ClientUpdate:
    blob: BlobRef | None = reply.content.blob if reply.content else None
    inline = reply.content.inline if reply.content else None
    return ClientUpdate(
        round=reply.round,
        client=reply.client,
        sha256=blob.sha256 if blob else "",
        size_bytes=blob.size_bytes if blob else len(inline or b""),
        train_s=reply.train_s,
        error=reply.error_reason if reply.error_code is not None else "",
    )


# --- words -----------------------------------------------------------------------------------------


def _format_weights(sha256: str, size_bytes: int) -> str:
    return f"{size_bytes} bytes with the digest {sha256}"


def _format_clients(clients: Iterable[str]) -> str:
    return ", ".join(sorted(clients)) or "nobody"


def _metrics_as_text(metrics: Mapping[str, float]) -> dict[str, str]:
    """As text: a figure that is no number is not equal to itself."""
    return {name: repr(value) for name, value in metrics.items()}


def _metric_as_text(told: Manifest | RoundResult, name: str) -> str:
    return repr(told.metrics.get(name))
