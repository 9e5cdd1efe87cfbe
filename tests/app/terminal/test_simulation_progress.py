"""The progress line of a simulation, and the line of a round."""

from datetime import UTC, datetime

import pytest

from fedbus.app.terminal.simulation_progress import RoundClock, SimulationView, render_round
from fedbus.contracts.run import RoundResult

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class ManualClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def view_of(clock: ManualClock, rounds: int = 4) -> SimulationView:
    view = SimulationView("mnist-sim-1", now=clock)
    view.start(rounds=rounds, done=0, clients=100, workers=2)
    return view


def test_before_the_first_message_the_import_is_shown(clock: ManualClock) -> None:
    assert SimulationView("mnist-sim-1", now=clock).render().plain == "mnist-sim-1 imports the app"


def test_the_line_shows_the_messages_of_the_round(clock: ManualClock) -> None:
    view = view_of(clock)
    clock.now += 5
    view.set_progress("train", done=5, failed=1, total=10)

    assert "round 1 of 4  train: 5 of 10 clients, 1 failed" in view.render().plain


def test_the_bar_moves_within_a_round(clock: ManualClock) -> None:
    view = view_of(clock, rounds=1)
    view.set_progress("train", done=5, failed=0, total=10)
    half = view.render().plain.count("━")
    view.set_progress("evaluate", done=1, failed=0, total=10)

    assert 0 < half < 24
    assert view.render().plain.count("━") >= half


def test_the_first_round_estimates_the_end_from_its_messages(clock: ManualClock) -> None:
    rounds = RoundClock(clock)
    clock.now += 10
    rounds.begin()
    assert rounds.remaining_s(3) is None
    clock.now += 2
    rounds.set_fraction(0.5)

    assert rounds.remaining_s(3) == pytest.approx(2 + 2 * 4)


def test_the_first_round_counts_only_until_there_are_others(clock: ManualClock) -> None:
    rounds = RoundClock(clock)
    clock.now += 30
    rounds.end_round()
    assert rounds.remaining_s(2) == pytest.approx(60)
    clock.now += 1
    rounds.set_fraction(0.5)
    assert rounds.remaining_s(2) == pytest.approx(1 + 2)
    rounds.end_round()

    assert rounds.remaining_s(2) == pytest.approx(2)


def test_finished_rounds_estimate_the_end(clock: ManualClock) -> None:
    rounds = RoundClock(clock)
    for seconds in (90, 4, 6):
        clock.now += seconds
        rounds.end_round()
    clock.now += 2

    assert rounds.remaining_s(2) == pytest.approx(3 + 5)
    assert rounds.remaining_s(0) == 0


def test_a_round_longer_than_the_others_does_not_count_backwards(clock: ManualClock) -> None:
    rounds = RoundClock(clock)
    clock.now += 1
    rounds.end_round()
    clock.now += 100

    assert rounds.remaining_s(2) == pytest.approx(1)


def test_the_eta_and_the_last_metrics_are_in_the_line(clock: ManualClock) -> None:
    view = view_of(clock)
    clock.now += 5
    view.end_round(RoundResult(round=1, metrics={"loss": 0.5, "accuracy": 0.75}))

    assert view.render().plain.endswith("round 2 of 4  ETA 15 s  loss 0.5000  accuracy 75.00%")


def test_a_finished_simulation_has_a_full_bar(clock: ManualClock) -> None:
    view = view_of(clock, rounds=1)
    view.end_round(RoundResult(round=1))

    assert view.render().plain == f"mnist-sim-1 {'━' * 24} round 1 of 1"


def test_without_a_number_of_rounds_there_is_no_bar(clock: ManualClock) -> None:
    view = view_of(clock, rounds=0)
    view.set_progress("query", done=1, failed=0, total=2)

    assert view.render().plain == "mnist-sim-1 round 1  query: 1 of 2 clients"


def test_a_round_is_one_line() -> None:
    result = RoundResult(
        round=2,
        metrics={"eval_loss": 0.25},
        seconds=1.5,
        participants={"c1": 1},
        failures={"c2": "it raised\nValueError", "c3": "lost"},
    )

    assert render_round(result, at=NOON).plain.split("  ", 1)[1] == (
        "round 2  loss 0.2500  1.50 s  1 client  2 failed: c2: it raised ValueError (and 1 more)"
    )


def test_round_0_is_the_initial_model() -> None:
    assert render_round(RoundResult(round=0), at=NOON).plain.endswith("round 0  the initial model")


def test_a_round_in_a_mode_shows_its_late_updates() -> None:
    result = RoundResult(round=3, seconds=2, participants={"a": 1}, mode="deadline", updates=4)
    assert "1 client  4 updates" in render_round(result, at=NOON).plain
    late = result.model_copy(update={"late_merged": 2, "late_dropped": 1})
    assert "4 updates, 2 late, 1 dropped" in render_round(late, at=NOON).plain
    assert "updates" not in render_round(RoundResult(round=3, participants={"a": 1}), at=NOON).plain
