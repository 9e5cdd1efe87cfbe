"""The messages of fedbus between the two sides of a run; Flower's own messages go over the SuperLink.

    server side                     client side
    `KeyRequest`     ────────────→  makes a key
                     ←────────────  `NodeKey`
    registers the key at the SuperLink
    `WatchRequest`   ────────────→  starts a SuperNode if none runs, and waits until it ends, at most *wait_s*
                     ←────────────  no content if it still runs, else an error; the server side sends the next request

The requests have kinds of the phases, so that the device offers captured data with `WatchRequest`.
"""

from typing import ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict

from fedbus.learning.payload import Payload

KEY_KIND: Final = "query.superlink-key"
WATCH_KIND: Final = "train.superlink"


class _Content(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    def pack(self) -> Payload:
        return Payload.pack([self.model_dump_json().encode()])

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Self:
        return cls.model_validate_json(bytes(data))


class KeyRequest(_Content):
    """Make a key for a SuperNode."""


class NodeKey(_Content):
    public_key: str
    """PEM."""


class WatchRequest(_Content):
    """Run a SuperNode for the SuperLink at *address*."""

    address: str
    """``host:port``."""
    certificate: str
    """The SuperLink's own certificate, as PEM: the only one that the SuperNode trusts."""
    wait_s: float
