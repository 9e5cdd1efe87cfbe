"""nats-py with fewer copies: on a small machine, most of what a large round costs is copying.

A large payload is copied five times on its way in through nats-py 2.16 and twice on its way out,
and is read in pieces of 32 KiB; here it is three times, once, and 512 KiB. There is no option for any of it,
so each of the three stands in the place of a part of nats-py; tests hold them to what they replace.

Without them a round of 10 MiB with 4 clients costs a fifth more CPU (`make bench`), and nothing else changes.
"""

from typing import Any, Final

from nats.aio import client as nats_client
from nats.aio.client import Client
from nats.protocol import command
from nats.protocol.parser import AWAITING_CONTROL_LINE, AWAITING_MSG_PAYLOAD, CRLF_SIZE, Parser

READ_BYTES: Final = 512 * 1024
"""How much is read from the socket at a time."""


def use_large_payload_parser(client: Client) -> None:
    """To be done before *client* connects."""
    client._ps = LargePayloadParser(client)  # noqa: SLF001 - no public way in nats-py 2.16
    nats_client.DEFAULT_BUFFER_SIZE = READ_BYTES
    command.pub_cmd = pub_cmd


def pub_cmd(subject: str, reply: str, payload: bytes | memoryview) -> bytes:
    """As nats-py's own, which adds the parts up one by one."""
    return b"".join((f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload, b"\r\n"))


class LargePayloadParser(Parser):
    """Collects a large payload as it comes, and joins it once. All else is nats-py's own work."""

    large_bytes = 64 * 1024

    def reset(self) -> None:
        super().reset()
        self._pieces: list[bytes | memoryview] = []
        self._held = 0
        """How much of the payload, and of the line's end behind it, is in the pieces."""

    async def parse(self, data: bytes = b"") -> None:
        if not self._pieces:
            await super().parse(data)
            self._begin_to_collect()
        elif self._held + len(data) < self.needed + CRLF_SIZE:
            self._collect(data)
        else:
            rest = memoryview(data)[self.needed + CRLF_SIZE - self._held :]
            await self._hand_on(data)
            if rest:
                await self.parse(bytes(rest))

    def _begin_to_collect(self) -> None:
        """If what nats-py waits for is the payload of a large message. One with headers is an event, and small."""
        if self.state == AWAITING_MSG_PAYLOAD and self.needed >= self.large_bytes and not self.header_needed:
            self._collect(bytes(self.buf))
            self.buf.clear()

    def _collect(self, data: bytes | memoryview) -> None:
        self._pieces.append(data)
        self._held += len(data)

    async def _hand_on(self, data: bytes) -> None:
        """The message, whose end is in *data*."""
        self._collect(memoryview(data)[: max(0, self.needed - self._held)])
        payload = b"".join(self._pieces)
        self._pieces, self._held = [], 0
        self.state = AWAITING_CONTROL_LINE
        about: dict[str, Any] = self.msg_arg
        whole = (
            payload if len(payload) == self.needed else payload[: self.needed]
        )  # the line's end came early
        await self.nc._process_msg(about["sid"], about["subject"], about["reply"], whole, None)  # noqa: SLF001
