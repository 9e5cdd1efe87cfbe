"""The properties of all lifecycles. A new lifecycle is tested as soon as it is in `LIFECYCLES`."""

import re
from enum import StrEnum
from typing import Any

import pytest

from fedbus.agents.client_manager.machine import APPLY_S, BOOTSTRAP_S, SYNC_S
from fedbus.agents.client_manager.run_choice import SPARE_S
from fedbus.agents.server_manager.training_run import PUBLISH_S
from fedbus.contracts.catalogue import CLIENT_AGENTS, FOLLOWS_LIFECYCLES, SERVER_AGENTS
from fedbus.contracts.client import CLIENT, FL_CLIENT, INFERENCE, InferenceEvent
from fedbus.contracts.examples import FACTS
from fedbus.contracts.lifecycle import AnyLifecycle, IllegalTransition, span_name
from fedbus.contracts.run import RUN, RunState
from fedbus.contracts.server import SERVER
from fedbus.contracts.transition import LIFECYCLES, Transition

LIMITS = {
    "APPLY_S": APPLY_S,
    "BOOTSTRAP_S": BOOTSTRAP_S,
    "PUBLISH_S": PUBLISH_S,
    "SPARE_S": SPARE_S,
    "SYNC_S": SYNC_S,
}
each_lifecycle = pytest.mark.parametrize("lifecycle", LIFECYCLES.values(), ids=lambda one: one.kind)

AT_REST = {
    "server": {"waiting"},
    "code": {"steady"},
    "schedule": {"watching"},
    "run": {"finished", "failed", "cancelled"},
    "client": {"serving", "terminated"},
    "fl_client": {"waiting", "finished"},
    "inference": {"empty", "serving"},
}
"""The states in which an entity may stay for ever. In all others it waits for something."""


def reachable(lifecycle: AnyLifecycle, start: Any) -> set[Any]:
    found, frontier = {start}, [start]
    while frontier:
        here = frontier.pop()
        new = {target for (source, _), target in lifecycle.arrows.items() if source == here} - found
        found |= new
        frontier += new
    return found


def states(lifecycle: AnyLifecycle) -> list[StrEnum]:
    kind: type[StrEnum] = lifecycle.states
    return list(kind)


@each_lifecycle
def test_every_state_can_be_reached(lifecycle: AnyLifecycle) -> None:
    assert reachable(lifecycle, lifecycle.initial) == set(states(lifecycle))


@each_lifecycle
def test_no_state_is_a_dead_end(lifecycle: AnyLifecycle) -> None:
    for state in states(lifecycle):
        assert reachable(lifecycle, state) & AT_REST[lifecycle.kind], f"{state} never ends"


@each_lifecycle
def test_every_state_that_waits_has_a_reason_and_a_limit(
    lifecycle: AnyLifecycle,
) -> None:
    waiting = {str(state) for state in states(lifecycle)} - AT_REST[lifecycle.kind]
    assert {str(state) for state in lifecycle.waits} == waiting
    assert all(wait.waiting_for and wait.deadline for wait in lifecycle.waits.values())


@each_lifecycle
def test_a_limit_in_seconds_is_the_constant_of_the_agent(lifecycle: AnyLifecycle) -> None:
    for wait in lifecycle.waits.values():
        for seconds, name in re.findall(r"(\d+) s \((\w+)\)", wait.deadline):
            assert float(seconds) == LIMITS[name]


@each_lifecycle
def test_every_state_that_waits_can_fail_or_retry(lifecycle: AnyLifecycle) -> None:
    for state in lifecycle.waits:
        ways_out = [arrow for arrow in lifecycle if arrow.source == state and arrow.event != "restarted"]
        assert len(ways_out) > 1, f"{state} has no arrow for a failure"


@each_lifecycle
def test_failure_events_are_in_the_table(lifecycle: AnyLifecycle) -> None:
    assert lifecycle.failure_events <= {arrow.event for arrow in lifecycle}


@each_lifecycle
def test_an_event_with_the_name_of_a_failure_is_one(lifecycle: AnyLifecycle) -> None:
    endings = ("failed", "fail_train", "refused", "rejected", "lost", "unavailable", "expired", "reverted")
    named = {arrow.event for arrow in lifecycle if arrow.event.endswith(endings)}
    assert named <= lifecycle.failure_events


@each_lifecycle
def test_the_owner_is_an_agent(lifecycle: AnyLifecycle) -> None:
    assert lifecycle.owner in SERVER_AGENTS + CLIENT_AGENTS


@each_lifecycle
def test_every_event_is_the_creation_or_has_an_arrow(lifecycle: AnyLifecycle) -> None:
    events: type[StrEnum] = lifecycle.events
    assert set(events) == {lifecycle.creation} | {arrow.event for arrow in lifecycle}
    assert lifecycle.creation not in {arrow.event for arrow in lifecycle}


@each_lifecycle
def test_an_event_without_an_arrow_is_rejected(lifecycle: AnyLifecycle) -> None:
    with pytest.raises(IllegalTransition, match=f"{lifecycle.kind}: teleported is not possible in state"):
        lifecycle.advance(lifecycle.initial, "teleported")
    assert not lifecycle.allows(lifecycle.initial, "teleported")


@each_lifecycle
def test_every_arrow_is_allowed_and_in_the_diagram(lifecycle: AnyLifecycle) -> None:
    diagram = lifecycle.mermaid()
    for source, event, target in lifecycle:
        assert lifecycle.allows(source, event)
        assert lifecycle.advance(source, event) == target
        assert f"    {source} --> {target}: {event}\n" in diagram


@each_lifecycle
def test_the_data_has_a_kind_and_a_key(lifecycle: AnyLifecycle) -> None:
    (facts,) = [one for one in FACTS if one.kind == lifecycle.kind]
    assert facts.key.split(".")[0]


def test_only_runs_have_final_states() -> None:
    assert RUN.final == {RunState.FINISHED, RunState.FAILED, RunState.CANCELLED}
    assert not (SERVER.final | CLIENT.final | FL_CLIENT.final | INFERENCE.final)


def test_training_does_not_stop_serving() -> None:
    """The inference agent leaves `serving` only for a new model, or when it restarts."""
    leaving = {event for source, event, target in INFERENCE if source == "serving" != target}
    assert leaving == {"infer_update", "restarted"}
    assert INFERENCE.advance(INFERENCE.states.UPDATING, InferenceEvent.LOAD_REFUSED) == "serving"


def test_an_agent_follows_only_existing_lifecycles() -> None:
    assert set(FOLLOWS_LIFECYCLES.values()) <= set(LIFECYCLES)


@each_lifecycle
def test_only_a_transition_along_an_arrow_is_legal(lifecycle: AnyLifecycle) -> None:
    (facts,) = [one for one in FACTS if one.kind == lifecycle.kind]
    source, event, target = next(iter(lifecycle))
    legal = Transition(task="mnist", event=event, source=source, target=target, facts=facts)

    assert legal.is_legal
    assert not legal.model_copy(update={"event": "teleported"}).is_legal


def test_a_span_name_has_kind_source_and_target() -> None:
    assert span_name("server", "recruiting", "training") == "server recruiting → training"
