"""A federation in separate processes, which the tests kill or freeze."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.process_federation import ProcessFederation, run_process_federation


@pytest.fixture
async def federation(tmp_path: Path) -> AsyncIterator[ProcessFederation]:
    async with run_process_federation(tmp_path) as federation:
        yield federation
