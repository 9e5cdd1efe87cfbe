"""The clients that are present at a virtual time, in the order of their names."""

import math
from typing import Any

import pytest

from fedbus.simulation.profiles.conditions import Conditions
from fedbus.simulation.profiles.schema import Profile
from fedbus.simulation.virtual_time import VirtualTime

CLIENTS = [f"client-{number:04}" for number in range(30)]


@pytest.mark.parametrize(
    "availability",
    [
        {"share": 0.5, "period-s": 60},
        {"hours": ["00:05-00:20", "12:00-13:00"], "spread-h": 1},
        {"intervals-s": [[0, 100], [300, 400]]},
    ],
)
def test_presence_follows_the_availability(availability: dict[str, Any]) -> None:
    profile = Profile.model_validate(
        {"groups": {"some": {"share": 0.7, "availability": availability}, "others": {}}}
    )
    conditions = Conditions(profile, CLIENTS, seed=4)
    clock = VirtualTime(conditions, CLIENTS)
    for now in (0.0, 1.0, 99.0, 100.0, 101.5, 350.0, 900.0, 5000.0):
        clock.advance(now)
        assert clock.present() == [client for client in CLIENTS if conditions.is_available(client, now)]
        first = min(conditions.next_availability_change(client, now) for client in CLIENTS)
        assert clock.next_presence_change() == pytest.approx(first)


def test_presence_without_absences_never_changes() -> None:
    clock = VirtualTime(Conditions(Profile.model_validate({"groups": {"all": {}}}), CLIENTS), CLIENTS)
    assert clock.present() == CLIENTS
    assert math.isinf(clock.next_presence_change())
