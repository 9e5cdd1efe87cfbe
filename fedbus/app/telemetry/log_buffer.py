"""Lines that are written in a moment: who says something does not wait until it is JSON and on the disk.

Rendering a line takes 7 µs in a loop that does nothing else and writing it 4, and several times that in a process that
has other things in its caches; many together take the former each, and are written at once. So what is said is only
noted, with the context it was said in, and a thread writes what came in EVERY_S.

A warning or worse, an exception, and whatever comes where WAITING lines wait already, is written at once, after all
that waits: the order stays, and no last words are lost. A process that is killed may lose EVERY_S of lines below that.
"""

import logging
import threading
from collections import deque
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Final, TextIO

EVERY_S: Final = 0.25
WAITING: Final = 4096


class AtOnce(logging.StreamHandler[TextIO]):
    """Renders lines, and writes all of them together when it is flushed."""

    def __init__(self) -> None:
        super().__init__()
        self._rendered: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._rendered.append(self.format(record))
        except Exception:  # noqa: BLE001  # what logging itself does of what somebody's words raise
            self.handleError(record)

    def flush(self) -> None:
        if not self._rendered:
            return
        self._rendered.append("")
        with suppress(OSError, ValueError):  # standard error is gone, and so is whoever might be told
            self.stream.write(self.terminator.join(self._rendered))
            self.stream.flush()
        self._rendered.clear()


class WrittenLater(logging.Handler):
    """Hands lines to *writer* from a thread of its own."""

    def __init__(self, writer: AtOnce) -> None:
        super().__init__()
        self._writer = writer
        self._waiting: deque[tuple[Context, logging.LogRecord]] = deque()
        self._writing = threading.RLock()  # a line may be said while one is written
        self._work = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Note it, or write it at once. No lock: a deque has its own."""
        if not isinstance(record.msg, dict):  # arguments may change until it is written
            record.msg, record.args = record.getMessage(), None
        self._waiting.append((copy_context(), record))
        if _is_urgent(record) or len(self._waiting) > WAITING or self._closing.is_set():
            self.flush()
        elif not self._work.is_set():
            self._begin()
        return True

    def flush(self) -> None:
        """Write all that waits."""
        with self._writing:
            while self._waiting:
                context, record = self._waiting.popleft()
                context.run(self._writer.handle, record)
            self._writer.flush()

    def close(self) -> None:
        """Write what waits; whatever comes now is written at once."""
        self._closing.set()
        self._work.set()
        self.flush()
        super().close()

    def _begin(self) -> None:
        self._work.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="write lines", daemon=True)
            self._thread.start()

    def _write_all(self) -> None:
        while not self._closing.is_set():
            self._work.wait()
            self._closing.wait(EVERY_S)
            self._work.clear()
            self.flush()


def _is_urgent(record: logging.LogRecord) -> bool:
    said = record.msg
    excepted = record.exc_info or (isinstance(said, dict) and said.get("exc_info"))
    return record.levelno >= logging.WARNING or bool(excepted)
