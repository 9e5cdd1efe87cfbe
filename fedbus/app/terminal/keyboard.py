"""Single keys as they are pressed, for a command that has the whole screen.

with keyboard(sys.stdin, pressed): ...      pressed("q"), pressed("down"), pressed("page down")
"""

import asyncio
import os
import re
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

HUNG_UP: Final = "hung up"
"""Told once when the terminal is gone."""
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
def read_keys(terminal: TextIO, pressed: Callable[[str], None]) -> Iterator[None]:
    """Hand every key to *pressed*, from the running loop, and echo none; the terminal is as before afterwards."""
    loop, descriptor = asyncio.get_running_loop(), terminal.fileno()
    before = termios.tcgetattr(descriptor)

    def read() -> None:
        found = os.read(descriptor, READ_BYTES)
        if not found:
            loop.remove_reader(descriptor)
            pressed(HUNG_UP)
        for key in parse_keys(found.decode(errors="ignore")):
            pressed(key)

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def parse_keys(text: str) -> list[str]:
    """What was pressed: the sequence of an arrow and ``q`` are ``down`` and ``q``."""
    return [KEY_NAMES.get(one, one) for one in _KEY_PATTERN.findall(text)]
