"""The bounded history of rounds: a run of any length fits into its transitions."""

from datetime import UTC, datetime

import pytest

from fedbus.contracts.client_metrics import MAX_METRICS
from fedbus.contracts.envelope import MAX_EVENT_BYTES, pack
from fedbus.contracts.run import MAX_REPORTED_CLIENTS, RoundResult, RunData, RunPlan, shorten_reasons
from fedbus.domain.round_history import MAX_ROUNDS, append_round


def result(number: int, clients: int = 3, failed: int = 0) -> RoundResult:
    names = [f"client-{one:05}" for one in range(clients)]
    return RoundResult(
        round=number,
        metrics={"loss": 1.0 / (number + 1), "accuracy": 0.5, "train_loss": 0.25, "eval_loss": 0.125},
        seconds=1.5,
        participants=dict.fromkeys(names, 1000),
        train_s=dict.fromkeys(names, 4.25),
        figures={
            name: {f"train_{'x' * 30}{at}": 0.25 for at in range(MAX_METRICS)}
            for name in names[:MAX_REPORTED_CLIENTS]
        },
        transfer_s=dict.fromkeys(names[:MAX_REPORTED_CLIENTS], 0.25),
        wait_s=dict.fromkeys(names[:MAX_REPORTED_CLIENTS], 0.25),
        failures=shorten_reasons(
            {f"broken-{one:05}": "the trainer ended with code 1: " + "x" * 200 for one in range(failed)}
        ),
    )


def history(count: int, clients: int = 3, failed: int = 0) -> tuple[RoundResult, ...]:
    rounds: tuple[RoundResult, ...] = ()
    for number in range(count):
        rounds = append_round(rounds, result(number, clients, failed))
    return rounds


def test_a_short_run_keeps_everything() -> None:
    assert history(9) == tuple(result(number) for number in range(9))


@pytest.mark.parametrize(
    ("rounds", "clients", "failed"), [(1000, 3, 0), (400, 100, 5), (20, 1500, 0), (3, 10_000, 4000)]
)
def test_a_long_or_a_large_run_fits_into_an_event(rounds: int, clients: int, failed: int) -> None:
    facts = RunData(
        task="mnist",
        run="mnist-1",
        plan=RunPlan(rounds=rounds),
        requested_at=datetime(2026, 1, 1, tzinfo=UTC),
        rounds=history(rounds, clients, failed),
        cohort=tuple(f"client-{one:05}" for one in range(clients)),
    )
    assert len(pack(facts)) < MAX_EVENT_BYTES


def test_reasons_are_shortened_after_those_that_are_reported() -> None:
    failures = shorten_reasons({f"c{one}": "no reply within 600 s, whatever" for one in range(300)})
    assert list(failures)[-1] == "c299"
    assert failures["c199"] == "no reply within 600 s, whatever"
    assert failures["c200"] == "no reply within 600 s, …"


def test_the_first_and_the_newest_rounds_keep_their_metrics() -> None:
    rounds = history(2 * MAX_ROUNDS)
    assert [one.round for one in (rounds[0], rounds[-1])] == [0, 2 * MAX_ROUNDS - 1]
    assert len(rounds) == MAX_ROUNDS
    assert rounds[-1] == result(2 * MAX_ROUNDS - 1)
    assert rounds[1].loss is not None


def test_a_repeated_round_replaces_the_first_result() -> None:
    again = result(3, clients=2)
    assert append_round(history(5), again) == (*history(3), again)
