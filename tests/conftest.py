"""Fixtures of all tests, and the order of test files."""

import gc
import os
import signal
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
from support import NatsServer, OwnNatsServer, nats_server
from support.fork_server import ForkServer, forked_children
from support.git_repositories import CommitSigner, make_signer
from support.lifecycle_coverage import LifecycleCoverage
from support.nats_server import SharedNatsServer

hypothesis.settings.register_profile("fedbus", deadline=None)  # examples may take long on a busy machine
hypothesis.settings.load_profile("fedbus")

SETTINGS = ("FEDBUS", "OTEL", "AWS", "NATS")
SLOW_DIRECTORIES = ("journeys", "faults")
"""Tests of whole federations: a few in each file, each as slow as a hundred other tests."""
FAST_FILES_BETWEEN = 4
"""Number of fast files between two slow ones."""


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with SIGINT ignored, and child processes inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(LifecycleCoverage(config))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without garbage collection: they are a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files early, between fast ones: slow ones need the CPU, most fast ones wait for I/O."""
    files = list(dict.fromkeys(item.path for item in items))
    slow = [path for path in files if path.parent.name in SLOW_DIRECTORIES]
    fast = [path for path in files if path.parent.name not in SLOW_DIRECTORIES]
    order = {path: (FAST_FILES_BETWEEN * number, 0) for number, path in enumerate(slow)}
    order |= {path: (number, 1) for number, path in enumerate(fast)}
    items.sort(key=lambda item: order[item.path])


@pytest.fixture(scope="module", autouse=True)
def _restore_settings() -> Iterator[None]:
    """Check that a file leaves no variable: the next file of the same worker would read it."""
    before = _read_settings()
    yield
    assert _read_settings() == before


def _read_settings() -> dict[str, str]:
    """The variables that fedbus reads."""
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[ForkServer]:
    """Fork the children of agents from a process that has imported their modules."""
    with forked_children() as server:
        yield server


@pytest.fixture
def real_children(fork_server: ForkServer) -> Iterator[None]:
    """Start the children of agents normally in this test, as in a federation."""
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
    """A real nats-server for one test, which may kill it."""
    directory = tmp_path / "nats"
    directory.mkdir()
    async with nats_server(directory) as server:
        yield server


@pytest.fixture
def nats(request: pytest.FixtureRequest, shared_nats: SharedNatsServer) -> NatsServer:
    """An empty NATS server: an account of the shared server, or the `own_nats` of the test."""
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
