"""A limit on the bytes of all request bodies that are read, parsed or queued at the same time.

The queue of the engine bounds the number of requests, but parsing needs several times the size of a body and
happens before the queue. Therefore memory is reserved before a body is read, and released with the response.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fedbus.agents.inference.plain_json import TOO_MANY_REQUESTS, HttpError


class RequestMemoryLimit:
    """A limit of *limit_bytes* for all request bodies together."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._reserved_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        return self._reserved_bytes

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Reserve *size_bytes* while the block runs.

        Raises:
            HttpError: 429, the limit is reached.

        """
        if self._reserved_bytes + size_bytes > self._limit_bytes:
            raise HttpError(
                TOO_MANY_REQUESTS, "too many large requests at the same time. Retry later", retry_after_s=1
            )
        self._reserved_bytes += size_bytes
        try:
            yield
        finally:
            self._reserved_bytes -= size_bytes
