"""The progress of a fetch: which chunks to request, which have arrived, which are next. No I/O.

At any time the chunks of a blob are, in order: taken (written to the sink), arrived or awaited (one window at
most), and not yet requested.
"""

from collections.abc import Iterator


class ReceiveProgress:
    def __init__(self, *, chunks: int, first: int = 0) -> None:
        self._chunks = chunks
        self._first = first
        self._next = first
        self._requested = first
        self._pending: set[int] = set()
        self._arrived: dict[int, bytes] = {}

    @property
    def is_complete(self) -> bool:
        return self._next == self._chunks

    @property
    def has_begun(self) -> bool:
        """True if any chunk has arrived."""
        return self._next > self._first or bool(self._arrived)

    @property
    def requested_until(self) -> int:
        return self._requested

    def request_window(self, window: int) -> range:
        """Return the chunks to request now, so that at most *window* are in flight; they are awaited from here on."""
        until = min(self._chunks, max(self._requested, self._next + window))
        chunks = range(self._requested, until)
        self._requested = until
        self._pending.update(chunks)
        return chunks

    def record_arrival(self, index: int, chunk: bytes) -> bool:
        """Add a chunk that arrived; return False for a repeated chunk or one that was not requested."""
        if index not in self._pending:
            return False
        self._pending.remove(index)
        self._arrived[index] = chunk
        return True

    def take_ready(self) -> list[bytes]:
        """Remove and return the chunks that are next in order and have arrived."""
        chunks = []
        while self._next in self._arrived:
            chunks.append(self._arrived.pop(self._next))
            self._next += 1
        return chunks

    def missing_ranges(self, below: int) -> Iterator[range]:
        """Yield the contiguous ranges of requested chunks *below* that index that have not arrived."""
        first = None
        end = min(below, self._requested)
        for index in range(self._next, end + 1):
            if index in self._pending and index < end:
                first = index if first is None else first
            elif first is not None:
                yield range(first, index)
                first = None
