"""A `Messenger` whose clients are sessions in threads of this process."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from queue import SimpleQueue

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import (
    ClientReply,
    ClientSession,
    ErrorCode,
    IncomingMessage,
    MessengerClosed,
    NotEnoughClients,
    OutgoingMessage,
    ReplyError,
    RoundTally,
)
from fedbus.learning.round_tallies import RoundTallies


class SessionMessenger:
    """The clients join and leave by `join` and `leave`. Everything else is that of `Messenger`."""

    run = "r1"
    has_open_messages = False

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.failed: dict[str, str] = {}
        self._sessions: dict[str, ClientSession] = {}
        self._node_configs: dict[str, dict[str, bool | int | float | str]] = {}
        self._changed = threading.Condition()
        self._closed: MessengerClosed | None = None
        self._tallies = RoundTallies()

    def join(self, client: str, session: ClientSession, **node_config: bool | float | str) -> None:
        with self._changed:
            self._sessions[client] = session
            self._node_configs[client] = dict(node_config)
            self._changed.notify_all()

    def leave(self, client: str) -> None:
        with self._changed:
            del self._sessions[client]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = MessengerClosed("the run is over")

    def clients(self) -> list[str]:
        with self._changed:
            if self._closed:
                raise self._closed
            return list(self._sessions)

    def failed_clients(self) -> dict[str, str]:
        return dict(self.failed)

    def wait_for_clients(self, count: int = 1, *, timeout_s: float | None = None) -> list[str]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._sessions) >= count, timeout_s):
                raise NotEnoughClients("too few clients")
            return list(self._sessions)

    def wait_for_change(self, clients: Collection[str], *, timeout_s: float) -> list[str]:
        with self._changed:
            self._changed.wait_for(lambda: set(self._sessions) != set(clients), timeout_s)
            return list(self._sessions)

    def send(
        self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None
    ) -> Iterator[ClientReply]:
        queue: SimpleQueue[ClientReply] = SimpleQueue()
        sent = list(messages)
        for message in sent:
            threading.Thread(target=self._handle, args=(message, queue.put), daemon=True).start()
        return iter([queue.get(timeout=timeout_s) for _ in sent])

    def post(self, messages: Iterable[OutgoingMessage], *, timeout_s: float | None = None) -> list[str]:
        raise NotImplementedError

    def collect(self, message_ids: Iterable[str]) -> list[ClientReply]:
        raise NotImplementedError

    @property
    def adds_updates(self) -> bool:
        return False

    def now(self) -> float:
        return time.monotonic()

    def take(self, *, timeout_s: float, clients: Collection[str] | None = None) -> ClientReply | None:
        raise NotImplementedError

    def accept(self, reply: ClientReply, *, samples: int = 0) -> None:
        self._tallies.accept(reply, samples)

    def reject(self, reply: ClientReply, reason: str) -> None:
        self._tallies.reject(reply, reason)

    def tally(self, round_number: int) -> RoundTally:
        return self._tallies.copy(round_number)

    def _handle(self, message: OutgoingMessage, reply: Callable[[ClientReply], None]) -> None:
        session = self._sessions.get(message.client)
        if session is None:
            lost = ReplyError(ErrorCode.CLIENT_LOST, f"{message.client}: left the run")
            reply(ClientReply(request=message, round=0, error=lost))
            return
        response = session.handle(
            IncomingMessage(
                message_id=message.message_id,
                kind=message.kind,
                data=message.payload.to_bytes(),
                node_config=self._node_configs[message.client],
            )
        )
        data = response.payload.to_bytes() if response.payload else None
        reply(ClientReply(request=message, round=0, data=data, error=response.error, created_at=time.time()))
