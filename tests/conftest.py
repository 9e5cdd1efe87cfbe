"""What every test may ask for."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
from support import NatsServer, OwnNatsServer, nats_server
from support.fork_server import ForkServer, forked_children
from support.git_repositories import CommitSigner, make_signer
from support.lifecycle_coverage import LifecycleCoverage
from support.nats_server import SharedNatsServer

hypothesis.settings.register_profile("fedbus", deadline=None)  # how long an example takes is no claim
hypothesis.settings.load_profile("fedbus")

SETTINGS = ("FEDBUS", "OTEL", "AWS", "NATS")
LONG = ("journeys", "faults")
"""Whole federations: few of them to a file, and each as long as a hundred others."""
SHORT_FOR_A_LONG = 4
"""So many short files come between two long ones."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LifecycleCoverage(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the long files early, between short ones: they need the processor, and most others wait for something."""
    files = list(dict.fromkeys(item.path for item in items))
    long = [path for path in files if path.parent.name in LONG]
    short = [path for path in files if path.parent.name not in LONG]
    place = {path: (SHORT_FOR_A_LONG * number, 0) for number, path in enumerate(long)}
    place |= {path: (number, 1) for number, path in enumerate(short)}
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(scope="module", autouse=True)
def _restore_settings() -> Iterator[None]:
    """What a file leaves in the environment, the next one of the same worker would read."""
    before = _read_settings()
    yield
    assert _read_settings() == before


def _read_settings() -> dict[str, str]:
    """All but what libraries note for themselves."""
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[ForkServer]:
    """Children of agents are forked from a process that has imported what they need."""
    with forked_children() as server:
        yield server


@pytest.fixture
def real_children(fork_server: ForkServer) -> Iterator[None]:
    """Children of agents start from nothing in this test, as they do in a federation."""
    with fork_server.disabled():
        yield


@pytest.fixture(scope="session")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNatsServer]:
    """A real nats-server for the tests of this worker."""
    server = SharedNatsServer(lambda: tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


@pytest.fixture
async def own_nats(tmp_path: Path) -> AsyncIterator[OwnNatsServer]:
    """A real nats-server of this test, which may kill it."""
    directory = tmp_path / "nats"
    directory.mkdir()
    async with nats_server(directory) as server:
        yield server


@pytest.fixture
def nats(request: pytest.FixtureRequest, shared_nats: SharedNatsServer) -> NatsServer:
    """NATS with nothing in it: an account of the shared server, or the own server of a test that asks for one."""
    if "own_nats" in request.fixturenames:
        own = request.getfixturevalue("own_nats")
        assert isinstance(own, NatsServer)
        return own
    return shared_nats.new_account()


@pytest.fixture(scope="session")
def ada(tmp_path_factory: pytest.TempPathFactory) -> CommitSigner:
    """A developer whose key is allowed."""
    return make_signer("ada", tmp_path_factory.mktemp("ada"))


@pytest.fixture
def signers(tmp_path: Path, ada: CommitSigner) -> Path:
    """The allowed signers: Ada."""
    file = tmp_path / "allowed_signers"
    file.write_text(ada.allowed_signers_line())
    return file
