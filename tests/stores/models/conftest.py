"""A URL in each backend, so that one suite tests all of them."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.memory_store import MemoryObjectStore

from fedbus.stores.models import open as models_open

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
