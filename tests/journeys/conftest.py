"""A federation with all agents and real training processes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer
from support.federation import FederationHarness, open_federation


@pytest.fixture
async def fed(nats: NatsServer, tmp_path: Path) -> AsyncIterator[FederationHarness]:
    async with open_federation(nats.url, tmp_path) as fed:
        yield fed
