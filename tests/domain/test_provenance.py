"""Provenance checks: mismatches between the log and the repository."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from fedbus.contracts.client import ClientJoined, RoundReply
from fedbus.contracts.examples import MODEL
from fedbus.contracts.message import Message
from fedbus.contracts.model import BlobRef, Manifest
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import RoundResult, RunData, RunPlan
from fedbus.contracts.transition import Transition
from fedbus.domain.provenance import (
    CheckOutcome,
    ClientUpdate,
    all_rounds,
    code_mismatches,
    collect_updates,
    lifecycle_violations,
    make_finding,
    manifest_mismatches,
    missing_updates,
    trace_ancestry,
)

NAN = float("nan")
LAST = RoundResult(round=2, metrics={"loss": NAN}, participants={"c1": 10})


def facts(*rounds: RoundResult) -> RunData:
    return RunData(
        task="mnist",
        run="mnist-1",
        plan=RunPlan(),
        requested_at=datetime.now(UTC),
        rounds=rounds,
        code_version="a" * 40,
        model=MODEL,
    )


def make_transition(source: str, event: str, target: str, *rounds: RoundResult) -> Transition:
    return Transition(task="mnist", event=event, source=source, target=target, facts=facts(*rounds))


def make_manifest(version: int, parent: int | None, *, lineage: int = 1, **changes: Any) -> Manifest:
    manifest = Manifest(
        **MODEL.model_dump(exclude={"version"}),
        version=version,
        task="mnist",
        created=datetime.now(UTC),
        parent=parent,
        lineage=lineage,
    )
    return manifest.model_copy(update=changes)


def make_round_message(client: str, number: int, kind: str = "train") -> RoundMessage:
    return RoundMessage(
        task="mnist",
        client=client,
        run="mnist-1",
        message_id=f"{kind}-{client}-{number}",
        message_type=kind,
        round=number,
        created_at=0.0,
        ttl_s=60.0,
        content=MessageContent(inline=b""),
    )


def make_round_reply(to: RoundMessage, error: str = "") -> RoundReply:
    blob = BlobRef(sha256="b" * 64, size_bytes=80, chunk_bytes=1024, holder="c1.trainer")
    return RoundReply(
        task="mnist",
        client=to.client,
        run=to.run,
        round=to.round,
        message_id="r",
        reply_to=to.message_id,
        created_at=0.0,
        ttl_s=60.0,
        content=None if error else MessageContent(blob=blob),
        error_code=200 if error else None,
        error_reason=error,
    )


def test_a_finding_lists_all_mismatches() -> None:
    assert make_finding("code", "fine", []).outcome is CheckOutcome.MATCH
    wrong = make_finding("code", "fine", ["this", "that"])
    assert (wrong.outcome, wrong.detail) == (CheckOutcome.MISMATCH, "this; that")


def test_a_loss_of_nan_is_equal_in_manifest_and_log() -> None:
    run = facts(LAST)
    values: dict[str, Any] = {
        "run": "mnist-1",
        "rounds": 2,
        "participants": {"c1": 10},
        "metrics": {"loss": NAN},
    }
    assert list(manifest_mismatches(make_manifest(MODEL.version, None, **values), run, LAST)) == []
    other = make_manifest(MODEL.version, None, **(values | {"metrics": {"loss": 0.1}}))
    assert list(manifest_mismatches(other, run, LAST)) == ["the manifest and the log differ in loss"]


@pytest.mark.parametrize(
    ("line", "versions", "problem"),
    [
        ([make_manifest(1, None)], [], ""),
        ([make_manifest(4, 2), make_manifest(2, 1), make_manifest(1, None)], [2, 1], ""),
        ([make_manifest(4, 2)], [], "version 2, the parent of version 4, does not exist"),
        ([make_manifest(4, 4)], [], "version 4 cannot be the parent of version 4"),
        (
            [make_manifest(4, 2, lineage=2), make_manifest(2, None)],
            [2],
            "version 4 is of lineage 2, its parent of lineage 1",
        ),
    ],
)
def test_the_ancestors_end_at_the_first_model_of_the_lineage(
    line: Sequence[Manifest], versions: list[int], problem: str
) -> None:
    found, wrong = trace_ancestry(line[0], {one.version: one for one in line})
    assert ([one.version for one in found], wrong) == (versions, problem)


def test_gaps_and_illegal_transitions_are_found() -> None:
    whole = [
        make_transition("", "requested", "requested"),
        make_transition("requested", "recruiting_started", "recruiting"),
    ]
    assert list(lifecycle_violations(whole)) == []
    jump = make_transition("running", "run_finished", "finished")
    assert list(lifecycle_violations([*whole, jump])) == ["the log has a gap between recruiting and running"]
    forbidden = make_transition("recruiting", "run_finished", "finished")
    assert list(lifecycle_violations([*whole, forbidden])) == [
        "no transition leads from recruiting to finished by run_finished"
    ]


def test_participants_of_old_and_repeated_rounds_are_recovered() -> None:
    first, again = (RoundResult(round=1, participants={client: 10}) for client in ("c1", "c2"))
    moves = [make_transition("running", "round_finished", "running", one) for one in (first, again, LAST)]
    forgotten = facts(RoundResult(round=1), LAST)
    assert all_rounds(forgotten, moves) == [again, LAST]


def test_only_replies_to_train_messages_are_updates() -> None:
    train, judge = make_round_message("c1", 1), make_round_message("c1", 1, "evaluate")
    named = make_round_message("c2", 1, "train.mine")
    messages: list[Message] = [
        train,
        judge,
        named,
        make_round_reply(train),
        make_round_reply(judge),
        make_round_reply(named, "it broke"),
    ]
    assert collect_updates(messages) == [
        ClientUpdate(round=1, client="c1", sha256="b" * 64, size_bytes=80, train_s=0.0),
        ClientUpdate(round=1, client="c2", sha256="", size_bytes=0, train_s=0.0, error="it broke"),
    ]
    rounds = [RoundResult(round=1, participants={"c1": 10, "c2": 10}), LAST]
    assert list(missing_updates(rounds, collect_updates(messages))) == [
        "the log has no update of c2 in round 1",
        "the log has no update of c1 in round 2",
    ]


def test_a_client_with_other_code_is_named() -> None:
    messages = [
        ClientJoined(task="mnist", client=client, run="mnist-1", code_version=code)
        for client, code in (("c1", "a" * 40), ("c2", "c" * 40), ("c3", ""))
    ]
    assert list(code_mismatches(facts(), messages)) == [f"c2 joined with code version {'c' * 40}"]


def test_a_late_update_is_logged_with_the_round_of_its_message() -> None:
    sent, fresh = make_round_message("c1", 3), make_round_message("c2", 5)
    updates = collect_updates([sent, fresh, make_round_reply(fresh), make_round_reply(sent)])
    merged = RoundResult(round=5, participants={"c1": 10, "c2": 10}, staleness={"c1": 2, "c2": 0})
    assert list(missing_updates([merged], updates)) == []
    wrong = merged.model_copy(update={"staleness": {"c1": 1, "c2": 0}})
    assert list(missing_updates([wrong], updates)) == ["the log has no update of c1 in round 5"]
