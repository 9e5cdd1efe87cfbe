"""The virtual time of an exchange, by hand computations and by laws."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbus.simulation.profiles.assignment import assign_groups, group_of_device
from fedbus.simulation.profiles.conditions import Arrival, Conditions
from fedbus.simulation.profiles.errors import ProfileError
from fedbus.simulation.profiles.reader import builtin_profiles, load_profile
from fedbus.simulation.profiles.schema import Profile

CLIENTS = [f"client-{number:04}" for number in range(10)]
FULL: Mapping[str, Any] = {
    "training": {"slowdown": 2},
    "delay": {"distribution": "uniform", "min-s": 1, "max-s": 3, "probability": 0.5},
    "latency": {"distribution": "exponential", "mean-s": 0.2},
    "bandwidth": {"down-mbit-s": 8, "up-mbit-s": 4},
    "loss": {"probability": 0.3, "retransmit-s": 0.1},
    "disconnections": {"every-s": 10, "duration": {"distribution": "lognormal", "median-s": 2, "sigma": 1}},
    "availability": {"share": 0.6, "period-s": 60},
}


def conditions_of(group: Mapping[str, Any], *, seed: int = 1, clients: list[str] | None = None) -> Conditions:
    profile = Profile.model_validate({"groups": {"all": group}})
    return Conditions(profile, clients or CLIENTS, seed=seed)


def exchange(group: Mapping[str, Any], message: int = 0, **parameters: Any) -> Arrival:
    return conditions_of(group).exchange(CLIENTS[0], message, **{"sent_at": 100.0, **parameters})


def test_no_conditions_cost_only_the_measured_time() -> None:
    assert exchange({}, train_s=2.5, download_bytes=10**6).at == 102.5


def test_each_part_has_its_time() -> None:
    group = {
        "training": {"slowdown": 3},
        "delay": 4,
        "latency": 0.5,
        "bandwidth": {"down-mbit-s": 8, "up-mbit-s": 2},
    }
    arrival = exchange(group, train_s=1.0, download_bytes=1_000_000, upload_bytes=500_000)
    assert arrival.download_s == 1.5
    assert arrival.train_s == 3.0
    assert arrival.delay_s == 4.0
    assert arrival.upload_s == 2.5
    assert arrival.at == 111.0
    assert arrival.free_at == 108.5


def test_busy_client_begins_when_it_is_free() -> None:
    arrival = exchange({}, train_s=1.0, free_at=107.0)
    assert (arrival.queue_s, arrival.at) == (7.0, 108.0)


def test_delay_follows_training_only() -> None:
    assert exchange({"delay": 4}, kind="evaluate").at == 100.0
    assert exchange({"delay": 4}, kind="train.distill").at == 104.0


def test_fixed_time_replaces_the_measured_one() -> None:
    group = {"training": {"seconds": 10, "slowdown": 1.5}}
    assert exchange(group, train_s=0.123).train_s == 15.0
    assert exchange(group, kind="evaluate", train_s=0.123).train_s == 0.0
    assert exchange({**group, "evaluation": {"seconds": 2}}, kind="evaluate").train_s == 2.0


def test_time_by_samples() -> None:
    assert exchange({"training": {"seconds-per-sample": 0.01}}, samples=600).train_s == 6.0


def test_transfer_waits_for_the_connection_and_continues() -> None:
    group = {
        "bandwidth": 8,
        "availability": {"intervals-s": [[0, 101], [110, 120]]},
    }
    arrival = exchange(group, download_bytes=3_000_000)
    assert (arrival.download_s, arrival.offline_s, arrival.at) == (3.0, 9.0, 112.0)


def test_client_that_never_returns_is_lost() -> None:
    assert exchange({"availability": {"intervals-s": [[0, 50]]}}).is_lost


def test_lost_messages_are_retransmitted_with_doubled_time() -> None:
    group = {"loss": {"probability": 0.5, "retransmit-s": 1.0}}
    times = [exchange(group, message).download_s for message in range(2000)]
    assert {0.0, 1.0, 3.0, 7.0} <= set(times)
    shares = [times.count(2.0**losses - 1) / 2000 for losses in range(4)]
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.0625], abs=0.04)


def test_dropped_messages_never_arrive() -> None:
    conditions = conditions_of({"loss": {"probability": 0.2, "then": "drop"}})
    lost = [conditions.exchange(CLIENTS[0], message, sent_at=0.0).is_lost for message in range(2000)]
    assert sum(lost) / 2000 == pytest.approx(1 - 0.8**2, abs=0.04)
    received = [conditions.receives(CLIENTS[0], message) for message in range(2000)]
    assert sum(received) / 2000 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.6, 1.0])
def test_delay_occurs_with_its_probability(probability: float) -> None:
    conditions = conditions_of({"delay": {"seconds": 5, "probability": probability}})
    delays = [conditions.exchange(CLIENTS[0], message, sent_at=0.0).delay_s for message in range(2000)]
    assert sum(delays) / 2000 == pytest.approx(5 * probability, abs=0.2)


@pytest.mark.parametrize(
    ("delay", "least_s"),
    [
        ({"distribution": "constant", "seconds": 3}, 3),
        ({"distribution": "uniform", "min-s": 1, "max-s": 5}, 1),
        ({"distribution": "normal", "mean-s": 3, "std-s": 0.5}, 0),
        ({"distribution": "lognormal", "median-s": 2, "sigma": 0.5}, 0),
        ({"distribution": "exponential", "mean-s": 3}, 0),
    ],
    ids=["constant", "uniform", "normal", "lognormal", "exponential"],
)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_sampled_mean_is_that_of_the_distribution(
    delay: Mapping[str, Any], least_s: float, seed: int
) -> None:
    conditions = conditions_of({"delay": delay}, seed=seed)
    group = conditions.device(CLIENTS[0]).group
    assert group.delay is not None
    values = [conditions.device(CLIENTS[0]).delay_s(message) for message in range(2000)]
    assert min(values) >= least_s
    assert sum(values) / 2000 == pytest.approx(group.delay.mean_s, abs=0.4)  # 6 standard errors of the widest


@settings(max_examples=20)
@given(
    order=st.permutations(list(itertools.product(CLIENTS[:3], range(4)))),
    seed=st.integers(0, 1000),
)
def test_order_of_queries_has_no_influence(order: list[tuple[str, int]], seed: int) -> None:
    def arrivals(queries: list[tuple[str, int]]) -> dict[tuple[str, int], Arrival]:
        conditions = conditions_of(FULL, seed=seed)
        return {
            (client, message): conditions.exchange(
                client,
                message,
                sent_at=50.0 * message,
                download_bytes=10**6,
                upload_bytes=10**6,
                train_s=1.0,
            )
            for client, message in queries
        }

    assert arrivals(order) == arrivals(sorted(order))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    message=st.integers(0, 1000),
    sent_at=st.floats(0, 10_000),
    sizes=st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)),
    train_s=st.floats(0, 100),
)
def test_parts_add_up_and_the_lower_bound_holds(
    seed: int, message: int, sent_at: float, sizes: tuple[int, int], train_s: float
) -> None:
    conditions = conditions_of(FULL, seed=seed)
    arrival = conditions.exchange(
        CLIENTS[0],
        message,
        sent_at=sent_at,
        download_bytes=sizes[0],
        upload_bytes=sizes[1],
        train_s=train_s,
    )
    parts = (
        arrival.download_s,
        arrival.queue_s,
        arrival.train_s,
        arrival.delay_s,
        arrival.upload_s,
        arrival.offline_s,
    )
    assert min(parts) >= 0
    assert sent_at + sum(parts) == pytest.approx(arrival.at)
    assert sent_at <= arrival.free_at <= arrival.at
    bound = conditions.earliest_arrival(CLIENTS[0], message, sent_at=sent_at, download_bytes=sizes[0])
    assert sent_at <= bound <= arrival.at
    assert conditions.is_connected(CLIENTS[0], math.nextafter(arrival.at, 0.0))


# --- absences -----------------------------------------------------------------------------------


def connected_share(conditions: Conditions, clients: list[str], until: float, step: float = 1.0) -> float:
    times = [number * step for number in range(int(until / step))]
    states = [conditions.is_connected(client, at) for client in clients for at in times]
    return sum(states) / len(states)


def test_share_of_the_time_is_that_of_the_profile() -> None:
    conditions = conditions_of({"availability": {"share": 0.7, "period-s": 100}})
    assert connected_share(conditions, CLIENTS, 20_000, 20.0) == pytest.approx(0.7, abs=0.05)


def test_disconnections_have_their_mean_time_and_duration() -> None:
    conditions = conditions_of({"disconnections": {"every-s": 90, "duration": 10}})
    assert connected_share(conditions, CLIENTS, 20_000, 5.0) == pytest.approx(0.9, abs=0.03)
    assert all(conditions.is_available(client, 777.0) for client in CLIENTS)


def test_hours_over_midnight() -> None:
    profile = Profile.model_validate(
        {"day-starts-at": "20:00", "groups": {"all": {"availability": {"hours": ["22:00-07:00"]}}}}
    )
    conditions = Conditions(profile, CLIENTS)
    hours = [conditions.is_available(CLIENTS[0], 3600.0 * hour + 1) for hour in range(24)]
    assert hours == [False] * 2 + [True] * 9 + [False] * 13
    assert conditions.next_change(CLIENTS[0], 0.0) == 2 * 3600
    assert conditions.next_change(CLIENTS[0], 3 * 3600.0) == 11 * 3600  # not at midnight
    assert conditions.next_change(CLIENTS[0], 11 * 3600.0) == 26 * 3600


def test_time_zones_shift_the_hours() -> None:
    conditions = conditions_of({"availability": {"hours": ["08:00-20:00"], "spread-h": 12}})
    first_changes = {conditions.next_change(client, 0.0) for client in CLIENTS}
    assert len(first_changes) == len(CLIENTS)


def test_repeated_intervals() -> None:
    conditions = conditions_of({"availability": {"intervals-s": [[0, 10], [20, 30]], "repeat-s": 30}})
    states = [conditions.is_available(CLIENTS[0], at) for at in (0, 9, 10, 19, 20, 29, 30, 39, 40, 50)]
    assert states == [True, True, False, False, True, True, True, True, False, True]
    changes = [10.0, 20.0, 40.0, 50.0, 70.0]
    assert [conditions.next_change(CLIENTS[0], at) for at in (0.0, *changes[:-1])] == changes


def test_clients_without_absences_never_change() -> None:
    assert math.isinf(conditions_of({}).next_change(CLIENTS[0], 5.0))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), at=st.floats(0, 5000))
def test_next_change_is_the_first_change(seed: int, at: float) -> None:
    conditions = conditions_of(FULL, seed=seed)
    change = conditions.next_change(CLIENTS[0], at)
    state = conditions.is_connected(CLIENTS[0], at)
    assert change > at
    assert conditions.is_connected(CLIENTS[0], change) != state
    between = [at + (change - at) * part / 10 for part in range(10)]
    assert {conditions.is_connected(CLIENTS[0], moment) for moment in between} == {state}


# --- groups -------------------------------------------------------------------------------------


def profile_of(groups: Mapping[str, Mapping[str, Any]]) -> Profile:
    return Profile.model_validate({"groups": groups})


def test_names_come_before_counts_and_shares() -> None:
    profile = profile_of(
        {"third": {"share": 0.3}, "named": {"clients": ["client-000[01]"]}, "two": {"count": 2}, "rest": {}}
    )
    groups = assign_groups(profile, CLIENTS, 5)
    assert groups["client-0000"] == groups["client-0001"] == "named"
    sizes = {name: list(groups.values()).count(name) for name in profile.groups}
    assert sizes == {"third": 3, "named": 2, "two": 2, "rest": 3}


@settings(max_examples=25)
@given(shares=st.lists(st.floats(0.01, 0.3), min_size=1, max_size=3), count=st.integers(1, 50))
def test_shares_are_rounded_to_the_nearest(shares: list[float], count: int) -> None:
    profile = profile_of({f"g{number}": {"share": share} for number, share in enumerate(shares)})
    groups = list(assign_groups(profile, [f"c{number}" for number in range(count)], 0).values())
    for number, share in enumerate(shares):
        assert abs(groups.count(f"g{number}") - share * count) < 1
    assert len(groups) == count


def test_thirds_of_the_device_groups() -> None:
    groups = assign_groups(load_profile("three-device-groups"), [f"c{number}" for number in range(9)], 0)
    assert sorted(groups.values()) == ["fast-device"] * 3 + ["medium-device"] * 3 + ["slow-device"] * 3


def test_clients_of_no_group_have_no_conditions() -> None:
    profile = profile_of({"slow": {"count": 1, "delay": 9}})
    conditions = Conditions(profile, ["a", "b"])
    assert sorted(conditions.exchange(client, 0, sent_at=0.0).at for client in "ab") == [0.0, 9.0]


def test_more_counted_clients_than_there_are() -> None:
    with pytest.raises(ProfileError, match="have 12 clients in total, and only 10 of 10 are left"):
        Conditions(profile_of({"slow": {"count": 12}}), CLIENTS)


def test_names_that_no_client_has() -> None:
    with pytest.raises(
        ProfileError, match=r"no client matches 'c1'. The clients are client-0000 … client-0009"
    ):
        Conditions(profile_of({"slow": {"clients": ["c1"]}}), CLIENTS)


def test_device_draws_its_group_by_share() -> None:
    profile = profile_of({"phone": {"share": 0.8}, "tablet": {}})
    groups = [group_of_device(profile, f"c{number}", 0) for number in range(1000)]
    assert groups.count("phone") / 1000 == pytest.approx(0.8, abs=0.05)


def test_device_cannot_know_a_counted_group() -> None:
    with pytest.raises(ProfileError, match="Choose its group: slow, rest"):
        group_of_device(profile_of({"slow": {"count": 2}, "rest": {}}), "c1", 0)


# --- built-in profiles --------------------------------------------------------------------------


@pytest.mark.parametrize("name", builtin_profiles())
def test_built_in_profile_serves_any_number_of_clients(name: str) -> None:
    for count in (1, 3, 100):
        clients = [f"client-{number:04}" for number in range(count)]
        conditions = Conditions(load_profile(name), clients)
        arrivals = [conditions.exchange(client, 0, sent_at=0.0, train_s=1.0) for client in clients]
        assert not any(arrival.is_lost for arrival in arrivals)


def test_delay_study_is_one_profile_with_parameters() -> None:
    for delay_s, probability in itertools.product((3, 4, 5), (0, 0.2, 0.4, 0.6, 0.8, 1)):
        profile = load_profile("delay-study", {"delay-s": delay_s, "probability": probability})
        conditions = Conditions(profile, ["c1", "c2", "c3"])
        delays = [conditions.device("c1").delay_s(message) for message in range(500)]
        assert set(delays) <= {0.0, delay_s}
        assert sum(delays) / 500 == pytest.approx(delay_s * probability, abs=0.4)
