"""The sessions of a worker's clients, and their state."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord
from simulation.tiny_tasks import write_task

from fedbus.learning.flower.client_app_host import ClientAppHost
from fedbus.learning.functions.client import FunctionsClient
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import (
    ClientJob,
    ClientResponse,
    ClientSession,
    IncomingMessage,
    MovableSession,
    StateNotMovable,
)
from fedbus.simulation.client_state import ClientSessions, is_memory_short


class Counter:
    """A session that counts, and whose state can move."""

    def __init__(self) -> None:
        self.count = 0
        self.is_closed = False

    def handle(self, message: IncomingMessage) -> ClientResponse:
        self.count += 1
        return ClientResponse()

    @property
    def has_state(self) -> bool:
        return self.count > 0

    def dump_state(self) -> bytes | None:
        return bytes([self.count]) if self.count else None

    def load_state(self, state: bytes) -> None:
        self.count = state[0]

    def close(self) -> None:
        self.is_closed = True


class Pinned:
    def handle(self, message: IncomingMessage) -> ClientResponse:
        return ClientResponse()

    def close(self) -> None: ...


def sessions(
    directory: Path, make: Callable[[int], ClientSession] = lambda _: Counter(), *, is_short: bool = True
) -> ClientSessions:
    return ClientSessions(make, directory=directory, is_memory_short=lambda: is_short)


def count(one: ClientSession) -> int:
    assert isinstance(one, Counter)
    return one.count


def use(all_sessions: ClientSessions, client: int) -> int:
    one = all_sessions.get(client)
    one.handle(IncomingMessage(message_id="m", kind="train", data=b""))
    return count(one)


def test_state_of_idle_clients_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    all_sessions = sessions(tmp_path)
    for client in range(4):
        use(all_sessions, client)
    assert all_sessions.relieve_memory() == 2
    assert len(all_sessions) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.state", "1.state"]  # the longest idle ones
    assert all_sessions.has_state(0)
    assert use(all_sessions, 0) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.state"]
    all_sessions.close()
    assert list(tmp_path.iterdir()) == []


def test_state_stays_in_memory_while_there_is_enough(tmp_path: Path) -> None:
    all_sessions = sessions(tmp_path, is_short=False)
    for client in range(4):
        use(all_sessions, client)
    assert all_sessions.relieve_memory() == 0


def test_a_session_that_cannot_move_stays_in_memory(tmp_path: Path) -> None:
    all_sessions = sessions(tmp_path, lambda _: Pinned())
    for client in range(4):
        all_sessions.get(client)
    assert all_sessions.relieve_memory() == 0
    with pytest.raises(StateNotMovable):
        all_sessions.remove(1)


def test_a_full_disk_leaves_the_state_in_memory(tmp_path: Path) -> None:
    all_sessions = sessions(tmp_path / "no such directory")
    for client in range(4):
        use(all_sessions, client)
    assert all_sessions.relieve_memory() == 0
    assert use(all_sessions, 0) == 2


def test_state_moves_to_a_session_on_another_worker(tmp_path: Path) -> None:
    first, second = sessions(tmp_path / "1"), sessions(tmp_path / "2")
    use(first, 7)
    state = first.remove(7)
    assert not first.has_state(7)
    assert count(second.get(7, state)) == 1


@pytest.mark.parametrize("library", ["flower", "functions"])
def test_the_state_of_a_library_moves(tmp_path: Path, library: str) -> None:
    task = write_task(tmp_path, library)
    open_one = open_library(library).open_client
    job = ClientJob(task=task, client="client-0000", run="r", node_config={"partition-id": 0})
    first, second = open_one(job), open_one(job)
    assert isinstance(first, MovableSession)
    assert isinstance(second, MovableSession)
    assert first.dump_state() is None
    if isinstance(first, FunctionsClient):
        first._state["count"] = [1, 2]
    else:
        assert isinstance(first, ClientAppHost)
        first._context.state["count"] = ConfigRecord({"count": [1, 2]})
    state = first.dump_state()
    assert state is not None
    second.load_state(state)
    assert second.dump_state() == state
    assert second.has_state


def test_functions_state_that_cannot_be_pickled_stays(tmp_path: Path) -> None:
    task = write_task(tmp_path, "functions")
    session = open_library("functions").open_client(ClientJob(task=task, client="c", run="r"))
    assert isinstance(session, FunctionsClient)
    session._state["lock"] = threading.Lock()
    with pytest.raises(StateNotMovable, match="lock"):
        session.dump_state()


def test_memory_is_short_above_the_share() -> None:
    assert is_memory_short(0.0)
    assert not is_memory_short(1.0)
