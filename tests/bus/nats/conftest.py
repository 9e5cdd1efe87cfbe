"""Tests of the adapters for nats-py, which the in-memory server does not use."""

import pytest


@pytest.fixture
def bus_kind() -> str:
    return "nats-server"
