"""Whether a client takes part: every no has its reason, and nothing else is a reason."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.client import CLIENT, ClientState
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import UpdateReady
from fedbus.domain.run_participation import (
    MAX_FAILURES,
    decline_reason,
    recruiting_summary,
    short_version,
    will_serve_soon,
)

NOW = datetime(2026, 3, 14, 12, tzinfo=UTC)
CODE = "3a1f6c0d9be2475f8a6e0b1c2d3e4f5061728394"
INVITATION = UpdateReady(
    task="tiny", run="tiny-1", plan=RunPlan(), recruit_until=NOW + timedelta(seconds=30), code_version=CODE
)


def reason_declined(
    *,
    state: ClientState = ClientState.SERVING,
    code: str = CODE,
    failures: int = 0,
    now: datetime = NOW,
    invitation: UpdateReady = INVITATION,
) -> str | None:
    return decline_reason(invitation, state=state, code_version=code, failures=failures, now=now)


def test_a_client_that_serves_on_the_same_code_takes_part() -> None:
    assert reason_declined() is None


def test_who_comes_too_late_is_told_when_it_was_over() -> None:
    assert reason_declined(now=NOW + timedelta(seconds=30)) == "recruiting for tiny-1 ended at 12:00:30"


def test_other_code_is_named_on_both_sides() -> None:
    assert reason_declined(code="sha256:feedface0123456789") == (
        "the run is on code 3a1f6c0d9be2, this client on feedface0123"
    )


def test_an_invitation_that_names_no_code_is_for_everyone() -> None:
    assert (
        reason_declined(invitation=INVITATION.model_copy(update={"code_version": ""}), code="other") is None
    )


def test_what_broke_a_client_twice_will_break_it_again() -> None:
    assert reason_declined(failures=MAX_FAILURES - 1) is None
    assert reason_declined(failures=MAX_FAILURES) == "this client has failed 2 times in tiny-1"


@pytest.mark.parametrize("state", [state for state in ClientState if state is not ClientState.SERVING])
def test_who_does_not_serve_does_not_train(state: ClientState) -> None:
    assert reason_declined(state=state) == f"this client is {state}"


@given(st.sampled_from(list(ClientState)), st.booleans(), st.integers(0, 5), st.integers(-60, 60))
def test_a_client_takes_part_exactly_if_there_is_no_reason_against_it(
    state: ClientState, same: bool, failures: int, seconds: int
) -> None:
    answer = reason_declined(
        state=state, code=CODE if same else "other", failures=failures, now=NOW + timedelta(seconds=seconds)
    )
    may = state is ClientState.SERVING and same and failures < MAX_FAILURES and seconds < 30
    assert (answer is None) == may


@pytest.mark.parametrize("state", [state for state in ClientState if will_serve_soon(state)])
def test_an_invitation_is_kept_only_where_serving_is_the_next_thing_to_come(state: ClientState) -> None:
    reachable, frontier = {state}, {state}
    while frontier:
        frontier = {
            arrow.target
            for arrow in CLIENT
            if arrow.source in frontier and arrow.event not in ("restarted", "client_start")
        } - reachable
        reachable |= frontier
    assert ClientState.SERVING in reachable


@pytest.mark.parametrize(
    ("version", "read"), [(CODE, "3a1f6c0d9be2"), ("sha256:00ff", "00ff"), ("", "(none)")]
)
def test_a_version_as_a_person_reads_it(version: str, read: str) -> None:
    assert short_version(version) == read


def test_of_many_that_declined_the_first_few_are_told_and_the_rest_are_counted() -> None:
    assert recruiting_summary([], 2, {f"c{n}": "busy" for n in range(7)}) == (
        "0 of 2 clients joined in time (none); c0 declined: busy; c1 declined: busy; c2 declined: busy; "
        "c3 declined: busy; c4 declined: busy; 2 more declined"
    )
