"""The status of a model version."""

from datetime import UTC, datetime

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import EMPTY_ARCHITECTURE, ModelRef
from fedbus.domain.version_status import CHAMPION, NEVER_SERVED, SERVED_BEFORE, status_of
from fedbus.learning.weights import architecture_digest


def version(number: int, architecture: str = "a" * 64) -> ModelRef:
    return ModelRef(version=number, sha256="b" * 64, size_bytes=9, architecture=architecture)


def test_a_version_is_champion_served_before_or_never_served() -> None:
    champion = Champion(version=3, term=2, before=(1,), since=datetime.now(UTC))
    statuses = [status_of(version(number), champion) for number in (1, 2, 3)]
    assert statuses == [SERVED_BEFORE, NEVER_SERVED, CHAMPION]


def test_a_version_without_tensors_was_never_served() -> None:
    """It is the first version of a task without a model, which was champion until the first run ended."""
    empty = architecture_digest({})
    champion = Champion(version=2, term=2, before=(1,), since=datetime.now(UTC))
    assert empty == EMPTY_ARCHITECTURE
    assert status_of(version(1, empty), champion) == NEVER_SERVED
    assert status_of(version(2, empty), champion) == CHAMPION


def test_without_a_champion_no_version_has_a_status() -> None:
    assert status_of(version(1), None) == ""
