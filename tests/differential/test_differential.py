"""What a Flower app observes over fedbus is what it observes under Flower's own simulation.

`make test-flower` runs these tests. `make test` compares some cases with `recordings.json`, which
`test_an_app_observes_the_same` verifies and `RECORD=1 make test-flower` writes.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from differential import (  # noqa: F401 - they register cases
    app_apps,
    grid_apps,
    legacy_apps,
    own_strategy_apps,
    privacy_apps,
    record_apps,
    strategy_apps,
    strategy_failure_apps,
    xgboost_apps,
)
from differential.cases import CASES, FlowerCase
from differential.over_fedbus import run_over_fedbus
from differential.recording import Recording, compare

RECORDINGS: Final = Path(__file__).parent / "recordings.json"
PAGE: Final = Path(__file__).parents[2] / "docs" / "flower-compatibility.md"
QUICK: Final = [name for name, case in CASES.items() if not case.slow]
RAY: Final = [
    "named_actions",
    "state_after_an_error",
    "error_of_the_app",
    "array_dtypes",
    "FedAvg",
    "legacy_FedAvg",
]
"""Cases that also run with Ray."""

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",  # Ray's, at its first start in a process
    "ignore::ResourceWarning",
)


@pytest.fixture
def run_under_flower() -> Callable[..., Recording]:
    from differential.under_flower import run_under_flower  # noqa: PLC0415 - imports Ray, which most runs do not need

    return run_under_flower


def read_recordings() -> dict[str, Any]:
    recordings: dict[str, Any] = json.loads(RECORDINGS.read_text()) if RECORDINGS.exists() else {}
    return recordings


def check(case: FlowerCase, expected: Any, actual: Any) -> None:
    """Compare two recordings: they differ in exactly the differences that the case names."""
    differences = compare(expected, actual)
    if not case.differs:
        assert not differences, "\n".join([case.claim, *differences])
        return
    unexplained = [line for line in differences if not any(_explains(name, line) for name in case.differs)]
    assert not unexplained, "\n".join([case.claim, *unexplained])
    missing = [name for name in case.differs if not any(_explains(name, line) for line in differences)]
    assert not missing, (
        f"{case.name} does not differ in {missing} any more: correct its `differs` and {PAGE.name}"
    )


EXPLAINED: Final = {
    "source of an error": r"replies\[\d+\]/(type|from): '(system|server)' under Flower",
}
"""The differences that remain, as in the table of docs/flower-compatibility.md."""


def _explains(name: str, line: str) -> bool:
    return re.search(EXPLAINED[name], line) is not None


@pytest.mark.differential
@pytest.mark.parametrize("name", CASES)
async def test_an_app_observes_the_same(
    tmp_path: Path, name: str, run_under_flower: Callable[..., Recording]
) -> None:
    case = CASES[name]
    expected = await asyncio.to_thread(run_under_flower, case, tmp_path)
    actual = await run_over_fedbus(case, tmp_path)
    check(case, expected, actual.recording)
    if os.environ.get("RECORD"):
        _write_recording(name, expected)
    assert compare(read_recordings().get(name), json.loads(json.dumps(expected))) == []


@pytest.mark.parametrize("name", QUICK)
async def test_an_app_observes_what_was_recorded_under_flower(tmp_path: Path, name: str) -> None:
    actual = await run_over_fedbus(CASES[name], tmp_path)
    check(CASES[name], read_recordings()[name], json.loads(json.dumps(actual.recording)))


@pytest.mark.differential
@pytest.mark.parametrize("name", RAY)
def test_ray_observes_the_same(tmp_path: Path, name: str, run_under_flower: Callable[..., Recording]) -> None:
    without_ray = run_under_flower(CASES[name], tmp_path / "without")
    assert compare(without_ray, run_under_flower(CASES[name], tmp_path / "with", with_ray=True)) == []


def test_the_page_lists_the_differences_that_remain() -> None:
    listed = re.findall(r"^\| ([^|]+?) +\|", PAGE.read_text(), re.MULTILINE)
    assert {name for name in listed if name in EXPLAINED} == set(EXPLAINED)
    assert {name for case in CASES.values() for name in case.differs} == set(EXPLAINED)


def _write_recording(name: str, recording: Any) -> None:
    recordings = read_recordings() | {name: recording}
    ordered = {key: recordings[key] for key in CASES if key in recordings}
    RECORDINGS.write_text(
        "{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in ordered.items())
        + "\n}\n"
    )
