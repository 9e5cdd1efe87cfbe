"""A federation in which each test has one agent at work, and plays the others over the bus."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer
from support.federation import Federation, federation


@pytest.fixture
async def fed(nats: NatsServer, tmp_path: Path) -> AsyncIterator[Federation]:
    async with federation(nats.url, tmp_path) as fed:
        yield fed
