"""How many bytes of requests are in hand at once: being read, taken apart, or waiting with what came of them.

The queue of the model bounds how many requests wait, but what a body is taken apart into is several times its
size, and that happens before the queue. So room is taken before the body is read, and given back with the answer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fedbus.agents.inference.plain_json import TOO_MANY_REQUESTS, HttpError


class RequestMemoryLimit:
    """Room for bodies of *most_bytes* in all."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes

    @contextmanager
    def room_for(self, size_bytes: int) -> Iterator[None]:
        """Room for a body, as long as the block runs. Raises Refusal where there is none just now."""
        if self._bytes + size_bytes > self._most_bytes:
            raise HttpError(TOO_MANY_REQUESTS, "too many large requests are in hand already", retry_after_s=1)
        self._bytes += size_bytes
        try:
            yield
        finally:
            self._bytes -= size_bytes
