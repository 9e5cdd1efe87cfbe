"""A subclass of nats-py's client with corrections.

nats-py 2.16 loses cancellations (see `cancellation`), stops receiving after some errors, and lets a request that NATS
denied time out.
"""

import asyncio
from typing import Any

from nats.aio import client as nats_client
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from fedbus.bus.errors import PermissionDenied
from fedbus.bus.nats.cancellation import propagate_cancellation

MAX_TRACKED_REQUESTS = 1000


class ReliableClient(Client):
    """A NATS client that stays able to receive, propagates cancellations, and fails requests without permission."""

    def __init__(self) -> None:
        super().__init__()
        self._reply_subjects: dict[str, str] = {}
        """The reply subject of the last request on each subject; keys in lower case, as in NATS's error texts."""
        self._denied_inbox: str | None = None
        """The inbox of this client, once NATS has denied the subscription to it."""

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        if self._denied_inbox is not None:
            raise _reply_denied(self._denied_inbox)
        with propagate_cancellation():
            return await super().request(*args, **kwargs)

    async def _flush_pending(self, force_flush: bool = False) -> Any:  # noqa: FBT001, FBT002  # nats-py's
        with propagate_cancellation():
            return await super()._flush_pending(force_flush)

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        if reply:
            self._reply_subjects[subject.lower()] = reply
            if len(self._reply_subjects) > MAX_TRACKED_REQUESTS:
                del self._reply_subjects[next(iter(self._reply_subjects))]
        await super().publish(subject, payload, reply, headers)

    async def flush(self, timeout: int = nats_client.DEFAULT_FLUSH_TIMEOUT) -> None:
        with propagate_cancellation():
            await super().flush(timeout)

    async def _process_pong(self) -> None:
        """Accept the PONG of a flush that timed out or was cancelled.

        nats-py 2.16 sets the result of its future, which is done, and the error ends the read loop.
        """
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _read_loop(self) -> None:
        """Read until the connection ends, and reconnect if an error ended the loop.

        nats-py 2.16 logs such an error and returns: the connection would count as connected and receive nothing.
        """
        await super()._read_loop()
        task = asyncio.current_task()
        is_cancelled = task is not None and task.cancelling() > 0
        if self.is_connected and not is_cancelled:
            await self._process_op_err(NatsError("nats: the read loop ended"))

    async def _close(self, status: int, do_cbs: bool = True) -> None:  # noqa: FBT001, FBT002  # nats-py's
        """Close also if the connection breaks while the last bytes are written.

        nats-py 2.16 then leaves subscriptions, callbacks and the socket as they are, and counts as closed.
        """
        try:
            await super()._close(status, do_cbs)
        except OSError:
            self._status = Client.DISCONNECTED
            await super()._close(status, do_cbs)

    async def _process_connect_init(self) -> None:
        """Close the connection if it cannot be used; nats-py 2.16 leaves it to the garbage collection."""
        try:
            await super()._process_connect_init()
        except BaseException:
            transport: Any = self._transport
            if transport is not None:
                transport.close()
            raise

    def _connect_command(self) -> bytes:
        """Hold back the CONNECT command, to send it in one write with the PING that follows it.

        nats-py 2.16 writes them one by one. A server that rejects CONNECT sends the reason and closes the connection;
        then the write of PING fails, and nats-py never reads the reason.
        """
        command: bytes = super()._connect_command()
        transport: Any = self._transport
        write = transport.write

        def write_both(payload: bytes) -> None:
            if payload:
                transport.write = write
                write(command + payload)

        transport.write = write_both
        return b""

    def fail_request(self, subject: str) -> None:
        """Fail the pending request on *subject*, which NATS denied."""
        if (reply := self._reply_subjects.pop(subject, None)) is None:
            return
        future = self._resp_map.get(reply.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_exception(PermissionDenied(f"publish on {subject}"))

    def fail_replies(self, subject: str) -> None:
        """Fail all pending requests if *subject*, whose subscription NATS denied, is the inbox of this client."""
        inbox = bytes(self._resp_sub_prefix or b"").decode().lower()
        if not inbox or subject != f"{inbox}*":
            return
        self._denied_inbox = subject
        for future in self._resp_map.values():
            if not future.done():
                future.set_exception(_reply_denied(subject))


def _reply_denied(subject: str) -> PermissionDenied:
    prefix = subject.rsplit(".", 2)[0]  # without the part that changes with each connection
    return PermissionDenied(f"receive replies on {prefix} with these credentials")
