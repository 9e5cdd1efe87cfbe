"""Fixtures: a URL in each backend, so that one suite tests all of them, and an S3 behind a faulty proxy."""

from collections.abc import AsyncIterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.memory_store import MemoryObjectStore
from support.s3_models import MIN_PART_BYTES
from support.s3_server import FaultyProxy, run_faulty_proxy

from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.stores.models import open as models_open
from fedbus.stores.models import s3 as models_s3

MEMORY: EntryPoint = EntryPoint("memory", "support.memory_store:MemoryObjectStore", models_open.GROUP)


@pytest.fixture
def memory_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in a backend of another package."""
    monkeypatch.setattr(models_open, "entry_points", lambda *, group: {models_open.GROUP: [MEMORY]}[group])
    monkeypatch.setattr(MemoryObjectStore, "folders", {})
    monkeypatch.setattr(MemoryObjectStore, "copies", tmp_path)
    return "memory://models"


def url_of(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path / "models")
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["directory", "s3", "memory"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, in each backend."""
    return url_of(request, tmp_path)


@pytest.fixture(params=["directory", "s3"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, in each backend that several processes can use."""
    return url_of(request, tmp_path)


@pytest.fixture
async def proxy(s3: EmbeddedS3) -> AsyncIterator[FaultyProxy]:
    async with run_faulty_proxy(s3.port) as proxy:
        yield proxy


@pytest.fixture
def far_url(s3_url: str, s3: EmbeddedS3, proxy: FaultyProxy) -> str:
    """The URL of `s3_url` through the proxy."""
    return s3_url.replace(f":{s3.port}", f":{proxy.port}")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload the smallest parts, which take little CPU time."""
    monkeypatch.setattr(models_s3, "PART_BYTES", MIN_PART_BYTES)
