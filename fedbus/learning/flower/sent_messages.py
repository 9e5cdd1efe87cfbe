"""The messages of a Grid that wait for replies, with the arrays that a compressed reply refers to.

A compressed update is a difference to the arrays of its message. The arrays of a message are in memory while the Grid
waits for its reply. Those of a message that was pushed, or whose wait is over, are kept for a late reply up to a limit
of bytes, unless the clients of the run do not compress.
"""

import weakref
from dataclasses import dataclass
from typing import Final

from flwr.app import Message, Metadata, RecordDict

from fedbus.learning.compression import BadEncoding
from fedbus.learning.flower.array_records import array_records_of
from fedbus.learning.flower.compressed_records import (
    SentArrays,
    copy_array_records,
    decode_updates,
    has_compressed_arrays,
)
from fedbus.learning.flower.private_api import serialized_buffer

MAX_KEPT_BYTES: Final = 1024**3
"""The limit for the arrays of messages without a reply that are kept for compressed updates."""


class SentContent:
    """The arrays of a content, which messages to several clients share. They are None if they are released."""

    def __init__(self, content: RecordDict) -> None:
        self.arrays: SentArrays | None = copy_array_records(content)
        self.size_bytes = sum(
            len(serialized_buffer(array)) for record in self.arrays.values() for array in record.values()
        )


@dataclass(frozen=True)
class SentRequest:
    """A message without a reply."""

    metadata: Metadata
    content: SentContent


class SentMessages:
    """The messages of one run whose replies are decoded later or now."""

    def __init__(self, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_kept_bytes = max_kept_bytes
        self._kept: list[weakref.ref[SentContent]] = []
        self._is_compressed: bool | None = None
        """Whether clients compress their updates; None before the first update."""

    @staticmethod
    def wrap(messages: list[Message]) -> list[SentRequest]:
        """Return *messages* with their arrays; messages of one content share them."""
        contents = {id(message.content): message.content for message in messages}
        shared = {key: SentContent(content) for key, content in contents.items()}
        return [SentRequest(message.metadata, shared[id(message.content)]) for message in messages]

    def keep(self, message: SentRequest) -> SentRequest:
        """Return *message* for a reply that may come late. Its arrays count against the limit."""
        content = message.content
        if self._is_compressed is False:
            content.arrays = None
            return message
        alive = [
            one for reference in self._kept if (one := reference()) is not None and one.arrays is not None
        ]
        if content.arrays is not None and not any(one is content for one in alive):
            alive.append(content)
        total = sum(one.size_bytes for one in alive)
        while alive and total > self._max_kept_bytes:
            oldest = alive.pop(0)
            oldest.arrays = None
            total -= oldest.size_bytes
        self._kept = [weakref.ref(one) for one in alive]
        return message

    def decode(self, content: RecordDict, message: SentRequest) -> None:
        """Decode the compressed arrays of *content*, an untrusted reply to *message*. Raises BadEncoding."""
        if not array_records_of(content):
            return
        if not has_compressed_arrays(content):
            self._is_compressed = self._is_compressed or False
            return
        self._is_compressed = True
        if message.content.arrays is None:
            raise BadEncoding(
                "the compressed update came too late: the weights to which it belongs are no longer in memory "
                f"(limit {self._max_kept_bytes} bytes)"
            )
        decode_updates(content, message.content.arrays)
