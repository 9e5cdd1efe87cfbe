"""The behaviour that training libraries need of a `Messenger`, as tests for all implementations."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import (
    ClientResponse,
    ErrorCode,
    IncomingMessage,
    Messenger,
    OutgoingMessage,
    ReplyError,
)
from fedbus.learning.payload import Payload

PLAN = RunPlan(rounds=1, quorum=2, round_s=20.0, recruit_s=10.0)
LONG_S = 60.0
"""A limit that no test reaches."""


class ScriptedSession:
    """A client that executes the text of a message: ``echo``, ``wait``, which lasts until `may_reply`, or ``fail``."""

    def __init__(self, client: str) -> None:
        self._client = client
        self.may_reply = threading.Event()

    def handle(self, message: IncomingMessage) -> ClientResponse:
        command = bytes(message.data).decode()
        if command == "fail":
            return ClientResponse(error=ReplyError(ErrorCode.CODE_RAISED, f"{self._client}: no data"))
        if command == "wait":
            self.may_reply.wait(LONG_S)
        return ClientResponse(payload=Payload.pack([f"{command} of {self._client}".encode()]))

    def close(self) -> None:
        """Do nothing."""


class MessengerSuite(ABC):
    """Subclass it in a test module, with a name that begins with ``Test``."""

    @abstractmethod
    def open_messenger(self, sessions: dict[str, ScriptedSession]) -> AbstractContextManager[Messenger]:
        """Open a messenger of a run with `PLAN`, whose clients are *sessions*."""

    @pytest.fixture
    def sessions(self) -> dict[str, ScriptedSession]:
        return {name: ScriptedSession(name) for name in ("client-0000", "client-0001")}

    @pytest.fixture
    def messenger(self, sessions: dict[str, ScriptedSession]) -> Iterator[Messenger]:
        with self.open_messenger(sessions) as messenger:
            assert sorted(messenger.wait_for_clients(2)) == list(sessions)
            yield messenger

    def test_send_yields_one_reply_for_each_message(self, messenger: Messenger) -> None:
        sent = [request("client-0000", "echo"), request("client-0001", "fail")]
        replies = {reply.client: reply for reply in messenger.send(sent)}
        assert bytes(replies["client-0000"].data or b"") == b"echo of client-0000"
        assert replies["client-0001"].error == ReplyError(ErrorCode.CODE_RAISED, "client-0001: no data")
        assert not messenger.has_open_messages

    def test_take_returns_posted_replies_in_order_of_arrival(
        self, messenger: Messenger, sessions: dict[str, ScriptedSession]
    ) -> None:
        slow, fast = request("client-0000", "wait"), request("client-0001", "echo")
        assert messenger.post([slow, fast]) == [slow.message_id, fast.message_id]
        first = messenger.take(timeout_s=LONG_S)
        sessions["client-0000"].may_reply.set()
        second = messenger.take(timeout_s=LONG_S)
        assert first is not None
        assert second is not None
        assert [first.client, second.client] == ["client-0001", "client-0000"]
        assert [first.request.message_id, first.round] == [fast.message_id, 1]
        assert bytes(second.data or b"") == b"wait of client-0000"
        assert messenger.collect([slow.message_id, fast.message_id]) == []  # each reply once

    def test_take_returns_the_error_of_a_client(self, messenger: Messenger) -> None:
        messenger.post([request("client-0001", "fail")])
        reply = messenger.take(timeout_s=LONG_S)
        assert reply is not None
        assert reply.error is not None
        assert "no data" in messenger.tally(1).failures["client-0001"]

    def test_take_returns_none_at_its_limit(self, messenger: Messenger) -> None:
        start = messenger.now()
        assert messenger.take(timeout_s=0.1) is None
        assert messenger.now() >= start + 0.1
        assert messenger.take(timeout_s=0.0) is None

    def test_take_waits_beyond_a_limit_that_has_passed(
        self, messenger: Messenger, sessions: dict[str, ScriptedSession]
    ) -> None:
        """The reply to a message that was late for one wait is there for the next."""
        messenger.post([request("client-0000", "wait")])
        assert messenger.take(timeout_s=0.05) is None
        assert messenger.has_open_messages
        sessions["client-0000"].may_reply.set()
        reply = messenger.take(timeout_s=LONG_S)
        assert reply is not None
        assert reply.client == "client-0000"

    def test_take_leaves_the_replies_of_send_alone(self, messenger: Messenger) -> None:
        posted, sent = request("client-0000", "echo"), request("client-0001", "echo")
        messenger.post([posted])
        assert [reply.client for reply in messenger.send([sent])] == ["client-0001"]
        reply = messenger.take(timeout_s=LONG_S)
        assert reply is not None
        assert reply.request.message_id == posted.message_id
        assert messenger.take(timeout_s=0.0) is None

    def test_take_returns_none_at_once_if_the_clients_changed(self, messenger: Messenger) -> None:
        assert messenger.take(timeout_s=LONG_S, clients=["client-0000"]) is None


def request(client: str, command: str) -> OutgoingMessage:
    return OutgoingMessage(client=client, kind="train", payload=Payload.pack([command.encode()]), round=1)
