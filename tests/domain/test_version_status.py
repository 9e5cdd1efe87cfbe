"""The status of a model version."""

from datetime import UTC, datetime

from fedbus.contracts.champion import Champion
from fedbus.domain.version_status import CHAMPION, NEVER_SERVED, SERVED_BEFORE, status_of


def test_a_version_is_champion_served_before_or_never_served() -> None:
    champion = Champion(version=3, term=2, before=(1,), since=datetime.now(UTC))
    assert [status_of(one, champion) for one in (1, 2, 3)] == [SERVED_BEFORE, NEVER_SERVED, CHAMPION]


def test_without_a_champion_no_version_has_a_status() -> None:
    assert status_of(1, None) == ""
