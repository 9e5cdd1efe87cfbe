"""Whole federations: every agent at work, its processes real ones."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer
from support.federation import Federation, federation


@pytest.fixture
async def fed(nats: NatsServer, tmp_path: Path) -> AsyncIterator[Federation]:
    async with federation(nats.url, tmp_path) as fed:
        yield fed
