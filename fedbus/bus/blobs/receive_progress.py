"""How far a fetch is: which chunks to ask for, which have come, which are next. No I/O.

At any time the chunks of a blob are, from the left: taken (in their place), arrived or
awaited (one window at most), and not yet asked for.
"""

from collections.abc import Iterator


class ReceiveProgress:
    def __init__(self, *, chunks: int, first: int = 0) -> None:
        self._chunks = chunks
        self._first = first
        self._taken = first
        self._asked = first
        self._awaited: set[int] = set()
        self._arrived: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        return self._taken == self._chunks

    @property
    def begun(self) -> bool:
        """Whether anything has come."""
        return self._taken > self._first or bool(self._arrived)

    @property
    def asked_until(self) -> int:
        return self._asked

    def ask(self, window: int) -> range:
        """The chunks to ask for now, so that *window* of them are under way; they are awaited from here on."""
        until = min(self._chunks, max(self._asked, self._taken + window))
        chunks = range(self._asked, until)
        self._asked = until
        self._awaited.update(chunks)
        return chunks

    def arrive(self, index: int, chunk: bytes) -> bool:
        """Whether this one was awaited: a repeat is no news, nor is what nobody asked for."""
        if index not in self._awaited:
            return False
        self._awaited.remove(index)
        self._arrived[index] = chunk
        return True

    def take(self) -> list[bytes]:
        """The chunks that are next in order, as far as they have come."""
        ripe = []
        while self._taken in self._arrived:
            ripe.append(self._arrived.pop(self._taken))
            self._taken += 1
        return ripe

    def missing(self, below: int) -> Iterator[range]:
        """What was asked for *below* and has not come, as unbroken ranges."""
        first = None
        end = min(below, self._asked)
        for index in range(self._taken, end + 1):
            if index in self._awaited and index < end:
                first = index if first is None else first
            elif first is not None:
                yield range(first, index)
                first = None
