"""What every test may ask for."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer, nats_server


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real nats-server of the test's own."""
    directory = tmp_path / "nats"
    directory.mkdir()
    async with nats_server(directory) as server:
        yield server
