"""What every test may ask for."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer, nats_server

LONG = ("journeys", "faults")
"""Whole stories: few of them to a file, and each as long as a hundred others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that at the end no worker is alone with them."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real nats-server of the test's own."""
    directory = tmp_path / "nats"
    directory.mkdir()
    async with nats_server(directory) as server:
        yield server
