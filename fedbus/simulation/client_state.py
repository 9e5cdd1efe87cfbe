"""The sessions of a worker's clients: opened at the first message, kept in memory while there is enough.

When memory is short, the sessions that were idle for the longest time are closed. Their state goes to a file in
*directory*, and a session that is opened again gets it back. A session without state needs no file. A session whose
library cannot take its state out (`fedbus.learning.library.MovableSession`) stays in memory.
"""

import ctypes
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, cast

import psutil
import structlog

from fedbus.common.filesystem import atomic_open
from fedbus.learning.library import ClientSession, MovableSession, StateNotMovable

CHECK_S: Final = 0.5
"""The interval of the checks of memory."""
MIN_IDLE_SHARE: Final = 0.5
"""The share of the sessions that is closed when memory is short."""
CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
CGROUP_USAGE: Final = Path("/sys/fs/cgroup/memory.current")

log = structlog.get_logger("fedbus.simulation")


class ClientSessions:
    """The sessions of one worker. *open_session* opens that of a client, without state."""

    def __init__(
        self,
        open_session: Callable[[int], ClientSession],
        *,
        directory: Path | None,
        is_memory_short: Callable[[], bool],
    ) -> None:
        self._open = open_session
        self._directory = directory
        self._is_memory_short = is_memory_short
        self._sessions: OrderedDict[int, ClientSession] = OrderedDict()
        """The least recently used first."""
        self._files: set[int] = set()
        """The clients whose state is in a file."""
        self._next_check = 0.0
        self._has_closed_some = False

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, client: int, state: bytes | None = None) -> ClientSession:
        """Return the session of *client*, opened with *state* or its file if it is not in memory. Raises BadTask."""
        session = self._sessions.get(client)
        if session is not None and state is None:
            self._sessions.move_to_end(client)
            return session
        session = self._open(client)
        if state is None and client in self._files:
            state = self._file(client).read_bytes()
        movable = as_movable(session)
        if state is not None and movable is not None:
            movable.load_state(state)
        self._sessions[client] = session
        self._forget_file(client)
        return session

    def has_state(self, client: int) -> bool:
        """Return whether the client has state that a new session would not have."""
        session = self._sessions.get(client)
        if session is None:
            return client in self._files
        movable = as_movable(session)
        return movable is None or movable.has_state

    def discard(self, client: int) -> None:
        """Close the session of *client* without its state."""
        self._forget_file(client)
        session = self._sessions.pop(client, None)
        if session is not None:
            _close(session)

    def remove(self, client: int) -> bytes | None:
        """Close the session of *client*, and return its state; None if it has none.

        Raises:
            StateNotMovable: the state cannot leave the session, which stays open.

        """
        session = self._sessions.get(client)
        movable = None if session is None else as_movable(session)
        if session is None:
            state = self._file(client).read_bytes() if client in self._files else None
        elif movable is not None:
            state = movable.dump_state()
        else:
            raise StateNotMovable("the training library cannot take the state out of a session")
        self.discard(client)
        return state

    def relieve_memory(self, *, busy: int | None = None) -> int:
        """Close idle sessions if memory is short, and return their number. The session of *busy* stays open."""
        now = time.monotonic()
        if now < self._next_check or len(self._sessions) < 2:
            return 0
        self._next_check = now + CHECK_S
        if not self._is_memory_short():
            return 0
        idle = [client for client in self._sessions if client != busy]
        closed = sum(map(self._move_to_disk, idle[: max(1, int(len(idle) * MIN_IDLE_SHARE))]))
        if closed:
            if not self._has_closed_some:
                log.warning("Memory is short; idle sessions are closed from now on", sessions=closed)
            self._has_closed_some = True
            return_free_memory()
        return closed

    def close(self) -> None:
        """Close all sessions."""
        for client in list(self._sessions):
            self.discard(client)
        for client in list(self._files):
            self._forget_file(client)

    def _move_to_disk(self, client: int) -> bool:
        movable = as_movable(self._sessions[client])
        if movable is None:
            return False
        try:
            state = movable.dump_state()
        except StateNotMovable as error:
            log.warning("State of a client stays in memory", client=client, reason=str(error))
            return False
        if state is not None:
            if self._directory is None:
                return False
            try:
                with atomic_open(self._file(client), durable=False) as file:
                    file.write(state)
            except OSError as error:
                log.warning("State of a client stays in memory", client=client, reason=str(error))
                return False
            self._files.add(client)
        _close(self._sessions.pop(client))
        return True

    def _file(self, client: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{client}.state"

    def _forget_file(self, client: int) -> None:
        if client in self._files:
            self._files.discard(client)
            self._file(client).unlink(missing_ok=True)


def as_movable(session: ClientSession) -> MovableSession | None:
    """Return *session* if its state can move. The check of a protocol is slow, so it is made once for each class."""
    return cast("MovableSession", session) if _is_movable(type(session)) else None


@cache
def _is_movable(session_class: type[ClientSession]) -> bool:
    return all(hasattr(session_class, name) for name in ("has_state", "dump_state", "load_state"))


def _close(session: ClientSession) -> None:
    try:
        session.close()
    except Exception as error:
        log.warning("Session did not close", exc_info=error)


def is_memory_short(share: float) -> bool:
    """Return whether more than *share* of the memory is in use: of this machine, or of the control group."""
    memory = psutil.virtual_memory()
    if memory.available < (1 - share) * memory.total:
        return True
    with suppress(OSError, ValueError):
        return int(CGROUP_USAGE.read_text()) > share * int(CGROUP_LIMIT.read_text())
    return False


def return_free_memory() -> None:
    """Return the free memory of this process to the system, where the C library can (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
