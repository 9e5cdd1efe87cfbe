"""Blobs on the in-memory server are tested by `make test-all`: they are the same code, with much data."""

from typing import Final

import pytest

IN_MEMORY: Final = pytest.param("memory", marks=pytest.mark.slow)


@pytest.fixture(params=["nats-server", IN_MEMORY])
def bus_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
