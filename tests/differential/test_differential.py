"""What a Flower app observes over fedbus is what it observes under Flower's own simulation."""

import pytest
from pathlib import Path

from differential import app_apps, grid_apps, legacy_apps, record_apps, strategy_apps  # noqa: F401 - they register the cases
from differential.cases import CASES
from differential.over_fedbus import run_over_fedbus
from differential.recording import compare
from differential.under_flower import run_under_flower
import asyncio

@pytest.mark.parametrize("name", CASES)
async def test_an_app_observes_the_same(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    expected = await asyncio.to_thread(run_under_flower, case, tmp_path)
    actual = await run_over_fedbus(case, tmp_path)
    assert compare(expected, actual.recording) == []
