"""Provenance of a model version: compares the log of its run with its manifest in the repository.

The caller reads both. Each check yields a text for each mismatch, and nothing if both agree. A check that
cannot be made, because the log has dropped its messages or no keys were given, is *open*; that is not a failure.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from fedbus.contracts.client import ClientJoined, RoundReply
from fedbus.contracts.message import Message
from fedbus.contracts.model import BlobRef, Manifest
from fedbus.contracts.round_messages import RoundMessage, is_training
from fedbus.contracts.run import RoundResult, RunData, RunEvent
from fedbus.contracts.transition import Transition


class CheckOutcome(StrEnum):
    """The outcome of a check."""

    MATCH = "fits"
    UNCHECKED = "not checked"
    MISMATCH = "does not fit"


@dataclass(frozen=True)
class ProvenanceFinding:
    """The subject of a check, its outcome, and a description."""

    subject: str
    outcome: CheckOutcome
    detail: str


@dataclass(frozen=True)
class ClientUpdate:
    """A client's reply to a train message: the digest and size of the update, or the error."""

    round: int | None
    client: str
    sha256: str
    size_bytes: int
    train_s: float
    error: str = ""


def make_finding(about: str, says: str, wrong: Iterable[str]) -> ProvenanceFinding:
    """Make a finding that describes all mismatches in *wrong*, or, if there are none, *says*."""
    mismatches = list(wrong)
    return ProvenanceFinding(
        about, CheckOutcome.MISMATCH if mismatches else CheckOutcome.MATCH, "; ".join(mismatches) or says
    )


# --- the manifest ----------------------------------------------------------------------------------


def manifest_mismatches(manifest: Manifest, run: RunData, last: RoundResult | None) -> Iterator[str]:
    """Compare the manifest with the log; *last* is the run's last round."""
    if manifest.run != run.run:
        yield f"the manifest of version {manifest.version} names {manifest.run or 'no run'}, the log {run.run}"
    if manifest.task != run.task:
        yield f"the manifest of version {manifest.version} names the task {manifest.task}, the log {run.task}"
    if run.model is not None and manifest.ref != run.model:
        yield (
            f"the log records {_format_weights(run.model.sha256, run.model.size_bytes)} as the run's result, "
            f"the manifest {_format_weights(manifest.sha256, manifest.size_bytes)}"
        )
    if last is not None:
        yield from _round_mismatches(manifest, last)


def _round_mismatches(manifest: Manifest, last: RoundResult) -> Iterator[str]:
    if manifest.rounds != last.round:
        yield f"the manifest counts {manifest.rounds} rounds, the log {last.round}"
    if dict(manifest.participants) != dict(last.participants):
        yield (
            f"the manifest names {_format_clients(manifest.participants)} as clients of the last round, "
            f"the log {_format_clients(last.participants)}"
        )
    if _metrics_as_text(manifest.metrics) != _metrics_as_text(last.metrics):
        names = sorted(manifest.metrics.keys() | last.metrics.keys())
        different = [name for name in names if _metric_as_text(manifest, name) != _metric_as_text(last, name)]
        yield f"the manifest and the log differ in {', '.join(different)}"


def config_mismatches(manifest: Manifest, run: RunData) -> Iterator[str]:
    """Compare the run configuration in the manifest with the run's plan in the log."""
    for name in sorted(manifest.config.keys() | run.plan.config.keys()):
        recorded, planned = manifest.config.get(name), run.plan.config.get(name)
        if recorded != planned:
            yield f"{name} is {planned!r} in the run's plan and {recorded!r} in the manifest"


def trace_ancestry(manifest: Manifest, known: Mapping[int, Manifest]) -> tuple[list[Manifest], str]:
    """Return the ancestors of *manifest*, the parent first, and what is wrong with that line (empty if nothing).

    The line should end at the first model of the lineage, which has no parent.
    """
    line: list[Manifest] = []
    child = manifest
    while child.parent is not None:
        parent = known.get(child.parent)
        if parent is None:
            return line, f"version {child.parent}, the parent of version {child.version}, does not exist"
        if parent.version >= child.version:
            return line, f"version {parent.version} cannot be the parent of version {child.version}"
        line.append(parent)
        if parent.lineage != child.lineage:
            return (
                line,
                f"version {child.version} is of lineage {child.lineage}, its parent of lineage {parent.lineage}",
            )
        child = parent
    return line, ""


# --- the log ---------------------------------------------------------------------------------------


def lifecycle_violations(moves: Sequence[Transition]) -> Iterator[str]:
    """Find transitions of the run that its lifecycle does not allow, and gaps between them."""
    for before, after in pairwise(moves):
        if after.source != before.target:
            yield f"the log has a gap between {before.target} and {after.source}"
    for move in moves:
        if move.source and not move.is_legal:
            yield f"no transition leads from {move.source} to {move.target} by {move.event}"


def all_rounds(run: RunData, moves: Iterable[Transition]) -> list[RoundResult]:
    """Collect all rounds with their participants from the transitions: the run's data drops those of old rounds.

    Of a round that was repeated after its server was lost, the last result counts.
    """
    rounds = {one.round: one for one in run.rounds}
    for move in moves:
        if move.event == RunEvent.ROUND_FINISHED and isinstance(move.facts, RunData) and move.facts.rounds:
            rounds[move.facts.rounds[-1].round] = move.facts.rounds[-1]
    return [rounds[number] for number in sorted(rounds)]


def code_mismatches(run: RunData, messages: Iterable[Message]) -> Iterator[str]:
    """Find clients that joined with a code version other than the run's."""
    for client, version in sorted(
        {(one.client, one.code_version) for one in messages if isinstance(one, ClientJoined)}
    ):
        if version not in ("", run.code_version):
            yield f"{client} joined with code version {version}"


def collect_updates(messages: Iterable[Message]) -> list[ClientUpdate]:
    """Collect the replies to train messages, in log order."""
    requests: dict[str, RoundMessage] = {}
    updates: list[ClientUpdate] = []
    for one in messages:
        match one:
            case RoundMessage():
                requests[one.message_id] = one
            case RoundReply() if _is_update(requests.get(one.reply_to)):
                updates.append(_update(one))
            case _:
                pass
    return updates


def missing_updates(rounds: Iterable[RoundResult], updates: Collection[ClientUpdate]) -> Iterator[str]:
    """Find participants of a round whose update is not in the log. A late update has the round of its message."""
    logged = {(one.round, one.client) for one in updates if not one.error}
    for result in rounds:
        missing = [
            client
            for client in result.participants
            if not {(result.round - result.staleness.get(client, 0), client), (None, client)} & logged
        ]
        if missing:
            yield f"the log has no update of {_format_clients(missing)} in round {result.round}"


def _is_update(request: RoundMessage | None) -> bool:
    return request is not None and is_training(request.message_type)


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


# --- texts -----------------------------------------------------------------------------------------


def _format_weights(sha256: str, size_bytes: int) -> str:
    return f"{size_bytes} bytes with the digest {sha256}"


def _format_clients(clients: Iterable[str]) -> str:
    return ", ".join(sorted(clients)) or "no clients"


def _metrics_as_text(metrics: Mapping[str, float]) -> dict[str, str]:
    """Convert *metrics* to text for comparison: NaN is not equal to itself, its text is."""
    return {name: repr(value) for name, value in metrics.items()}


def _metric_as_text(record: Manifest | RoundResult, name: str) -> str:
    return repr(record.metrics.get(name))
