"""What is true of every lifecycle, whatever it is about. A new table is tested by being listed."""

from enum import StrEnum
from typing import Any

import pytest

from fedbus.contracts.catalogue import CLIENT_AGENTS, FOLLOWS_LIFECYCLES, SERVER_AGENTS
from fedbus.contracts.client import CLIENT, FL_CLIENT, INFERENCE, InferenceEvent
from fedbus.contracts.examples import FACTS
from fedbus.contracts.lifecycle import AnyLifecycle, IllegalTransition, span_name
from fedbus.contracts.run import RUN, RunState
from fedbus.contracts.server import SERVER
from fedbus.contracts.transition import LIFECYCLES, Transition

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
"""Where a thing may stay for ever: nothing is owed to anybody. Everywhere else it waits for something."""


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
        assert reachable(lifecycle, state) & AT_REST[lifecycle.kind], f"{state} never comes to rest"


@each_lifecycle
def test_every_state_that_is_not_at_rest_says_what_it_waits_for_and_how_long(
    lifecycle: AnyLifecycle,
) -> None:
    waiting = {str(state) for state in states(lifecycle)} - AT_REST[lifecycle.kind]
    assert {str(state) for state in lifecycle.waits} == waiting
    assert all(wait.waiting_for and wait.deadline for wait in lifecycle.waits.values())


@each_lifecycle
def test_every_state_that_waits_can_give_up_or_try_again(lifecycle: AnyLifecycle) -> None:
    for state in lifecycle.waits:
        ways_out = [arrow for arrow in lifecycle if arrow.source == state and arrow.event != "restarted"]
        assert len(ways_out) > 1, f"{state} knows success alone"


@each_lifecycle
def test_what_goes_wrong_in_it_are_events_of_its_table(lifecycle: AnyLifecycle) -> None:
    assert lifecycle.failure_events <= {arrow.event for arrow in lifecycle}


@each_lifecycle
def test_an_event_that_is_called_a_failure_is_one(lifecycle: AnyLifecycle) -> None:
    sounds = ("failed", "fail_train", "refused", "rejected", "lost", "unavailable", "expired", "reverted")
    heard = {arrow.event for arrow in lifecycle if arrow.event.endswith(sounds)}
    assert heard <= lifecycle.failure_events


@each_lifecycle
def test_its_owner_is_an_agent(lifecycle: AnyLifecycle) -> None:
    assert lifecycle.owner in SERVER_AGENTS + CLIENT_AGENTS


@each_lifecycle
def test_every_event_is_the_creation_or_has_an_arrow(lifecycle: AnyLifecycle) -> None:
    events: type[StrEnum] = lifecycle.events
    assert set(events) == {lifecycle.creation} | {arrow.event for arrow in lifecycle}
    assert lifecycle.creation not in {arrow.event for arrow in lifecycle}


@each_lifecycle
def test_what_has_no_arrow_is_refused(lifecycle: AnyLifecycle) -> None:
    with pytest.raises(IllegalTransition, match=f"{lifecycle.kind}: teleported is not possible in state"):
        lifecycle.advance(lifecycle.initial, "teleported")
    assert not lifecycle.allows(lifecycle.initial, "teleported")


@each_lifecycle
def test_every_arrow_is_allowed_leads_to_its_target_and_is_in_the_diagram(lifecycle: AnyLifecycle) -> None:
    diagram = lifecycle.mermaid()
    for source, event, target in lifecycle:
        assert lifecycle.allows(source, event)
        assert lifecycle.advance(source, event) == target
        assert f"    {source} --> {target}: {event}\n" in diagram


@each_lifecycle
def test_its_facts_know_its_kind_and_where_they_stand(lifecycle: AnyLifecycle) -> None:
    (facts,) = [one for one in FACTS if one.kind == lifecycle.kind]
    assert facts.thing.split(".")[0]


def test_only_what_is_at_rest_for_good_is_final() -> None:
    assert RUN.final == {RunState.FINISHED, RunState.FAILED, RunState.CANCELLED}
    assert not (SERVER.final | CLIENT.final | FL_CLIENT.final | INFERENCE.final)


def test_serving_stops_for_no_training() -> None:
    """The inference agent leaves `serving` only for a new model, or when it starts anew."""
    leaving = {event for source, event, target in INFERENCE if source == "serving" != target}
    assert leaving == {"infer_update", "restarted"}
    assert INFERENCE.advance(INFERENCE.states.UPDATING, InferenceEvent.LOAD_REFUSED) == "serving"


def test_an_agent_follows_only_lifecycles_that_there_are() -> None:
    assert set(FOLLOWS_LIFECYCLES.values()) <= set(LIFECYCLES)


@each_lifecycle
def test_a_transition_along_an_arrow_is_legal_and_any_other_is_not(lifecycle: AnyLifecycle) -> None:
    (facts,) = [one for one in FACTS if one.kind == lifecycle.kind]
    source, event, target = next(iter(lifecycle))
    legal = Transition(task="mnist", event=event, source=source, target=target, facts=facts)

    assert legal.is_legal
    assert not legal.model_copy(update={"event": "teleported"}).is_legal


def test_a_span_is_called_by_what_moved_from_where_to_where() -> None:
    assert span_name("server", "recruiting", "training") == "server recruiting → training"
