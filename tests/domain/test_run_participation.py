"""Whether a client joins a run: every decline has a reason."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.client import CLIENT, ClientState
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import UpdateReady
from fedbus.domain.run_participation import (
    MAX_FAILURES,
    MAX_REASON_CHARS,
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


def test_a_client_that_serves_the_same_code_joins() -> None:
    assert reason_declined() is None


def test_a_late_client_declines_with_the_end_of_recruiting() -> None:
    assert reason_declined(now=NOW + timedelta(seconds=30)) == "recruiting for tiny-1 ended at 12:00:30"


def test_a_decline_names_both_code_versions() -> None:
    assert reason_declined(code="sha256:feedface0123456789") == (
        "the run is on code 3a1f6c0d9be2, this client on feedface0123"
    )


def test_an_invitation_without_code_version_is_for_all_clients() -> None:
    assert (
        reason_declined(invitation=INVITATION.model_copy(update={"code_version": ""}), code="other") is None
    )


def test_a_client_declines_after_two_failures_in_the_run() -> None:
    assert reason_declined(failures=MAX_FAILURES - 1) is None
    assert reason_declined(failures=MAX_FAILURES) == "this client has failed 2 times in tiny-1"


@pytest.mark.parametrize("state", [state for state in ClientState if state is not ClientState.SERVING])
def test_a_client_that_is_not_serving_declines(state: ClientState) -> None:
    assert reason_declined(state=state) == f"this client is {state}"


@given(st.sampled_from(list(ClientState)), st.booleans(), st.integers(0, 5), st.integers(-60, 60))
def test_a_client_joins_exactly_if_it_has_no_reason_to_decline(
    state: ClientState, same: bool, failures: int, seconds: int
) -> None:
    answer = reason_declined(
        state=state, code=CODE if same else "other", failures=failures, now=NOW + timedelta(seconds=seconds)
    )
    may = state is ClientState.SERVING and same and failures < MAX_FAILURES and seconds < 30
    assert (answer is None) == may


@pytest.mark.parametrize("state", [state for state in ClientState if will_serve_soon(state)])
def test_an_invitation_is_kept_only_in_states_that_lead_to_serving(state: ClientState) -> None:
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
    ("version", "short"), [(CODE, "3a1f6c0d9be2"), ("sha256:00ff", "00ff"), ("", "(none)")]
)
def test_a_code_version_is_shortened(version: str, short: str) -> None:
    assert short_version(version) == short


def test_a_summary_names_a_few_declined_clients() -> None:
    assert recruiting_summary([], 2, {f"c{n}": "busy" for n in range(7)}) == (
        "0 of 2 clients joined in time (none); c0 declined: busy; c1 declined: busy; c2 declined: busy; "
        "c3 declined: busy; c4 declined: busy; 2 more declined"
    )


def test_a_summary_names_a_few_clients_that_joined() -> None:
    joined = [f"c{number}" for number in range(9000)]
    assert recruiting_summary(joined[:5], 6, {}) == "5 of 6 clients joined in time (c0, c1, c2, c3, c4)"
    assert recruiting_summary(joined, 9001, {}) == (
        "9000 of 9001 clients joined in time (c0, c1, c2, c3, c4 and 8995 more)"
    )


def test_a_summary_limits_each_reason() -> None:
    """A reason of a megabyte would make the transition of the server too large to be published."""
    text = recruiting_summary([], 2, {"c1": "x" * 1_000_000}, {"c2": "y" * 1_000_000})
    assert ("x" * MAX_REASON_CHARS in text, "y" * MAX_REASON_CHARS in text) == (True, True)
    assert len(text) < 3 * MAX_REASON_CHARS
