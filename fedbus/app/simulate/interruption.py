"""Ctrl-C in a simulation: the first ends it cleanly, the second ends this process at once.

The workers are in a session of their own, so a terminal does not signal them; they end when this process does.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final

from fedbus.app.failures import ExitCode

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR: Final = "\x1b[?25h"
CLEAR_LINE: Final = "\r\x1b[2K"
"""Erases the progress bar, and the ^C that the terminal has echoed."""


@dataclass
class Interruption:
    """The first signal that a block got, if it got one."""

    number: int | None = None

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the command, as shells have it for a process that the signal has ended."""
        return ExitCode.TERMINATED if self.number == signal.SIGTERM else ExitCode.INTERRUPTED


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Raise KeyboardInterrupt in the main thread at the first SIGINT or SIGTERM; exit at the second."""
    interruption = Interruption()

    def handle(number: int, _: FrameType | None) -> None:
        if interruption.number is not None:
            if os.isatty(sys.stderr.fileno()):  # a progress bar has hidden it
                os.write(sys.stderr.fileno(), SHOW_CURSOR.encode())
            os._exit(128 + number)
        interruption.number = number
        if number == signal.SIGINT:
            clear = CLEAR_LINE if os.isatty(sys.stderr.fileno()) else ""
            os.write(sys.stderr.fileno(), f"{clear}stopping; press Ctrl-C again to end at once\n".encode())
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
