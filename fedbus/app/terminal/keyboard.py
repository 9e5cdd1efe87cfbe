"""Read single keys, for a command that uses the whole screen.

with read_keys(sys.stdin, on_key): ...      on_key("q"), on_key("down"), on_key("page down")
"""

import asyncio
import os
import re
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

TERMINAL_CLOSED: Final = "terminal closed"
"""Passed once, in place of a key, when the terminal closes."""
READ_BYTES: Final = 256

KEY_NAMES: Final = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1b[1~": "home",
    "\x1b[4~": "end",
    "\x1bOH": "home",
    "\x1bOF": "end",
    " ": "page down",
}
_KEY_PATTERN: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Za-z]|.", re.DOTALL)


@contextmanager
def read_keys(terminal: TextIO, on_key: Callable[[str], None]) -> Iterator[None]:
    """Pass each key to *on_key* on the running loop, without echo; restore the terminal at the end."""
    loop, descriptor = asyncio.get_running_loop(), terminal.fileno()
    before = termios.tcgetattr(descriptor)

    def read() -> None:
        data = os.read(descriptor, READ_BYTES)
        if not data:
            loop.remove_reader(descriptor)
            on_key(TERMINAL_CLOSED)
        for key in parse_keys(data.decode(errors="ignore")):
            on_key(key)

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def parse_keys(text: str) -> list[str]:
    """Split *text* into keys and name them: an escape sequence and ``q`` become ``down`` and ``q``."""
    return [KEY_NAMES.get(one, one) for one in _KEY_PATTERN.findall(text)]
