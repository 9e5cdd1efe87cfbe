"""A terminal for a command: a pty of a size, whose screen is what came out of it."""

import asyncio
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

_ESCAPES: Final = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>()][A-Z0-9]?)")


@dataclass
class Terminal:
    """What a command in it has written so far, and its keyboard."""

    process: asyncio.subprocess.Process
    descriptor: int
    chunks: list[str] = field(default_factory=list)

    @property
    def raw(self) -> str:
        return "".join(self.chunks)

    @property
    def lines(self) -> list[str]:
        """The last screen that was drawn whole, without colours."""
        screen = self.raw.rpartition("\x1b[H")[2]
        return _ESCAPES.sub("", screen).replace("\r", "").split("\n")

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        _set_size(self.descriptor, columns, rows)


@asynccontextmanager
async def open_terminal(
    *words: str, environment: Mapping[str, str], columns: int = 80, rows: int = 24
) -> AsyncIterator[Terminal]:
    """`fedbus` with these *words* on a terminal of its own, for as long as the block runs."""
    ours, theirs = pty.openpty()
    _set_size(ours, columns, rows)
    clean = {
        name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedbus.app.cli.main",
        *words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean | {"TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown = Terminal(process, ours)
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, _read, shown)
    try:
        yield shown
    finally:
        loop.remove_reader(ours)
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(ours)


def _read(shown: Terminal) -> None:
    try:
        found = os.read(shown.descriptor, 65536)
    except OSError:  # the command has closed its end
        found = b""
    if found:
        shown.chunks.append(found.decode(errors="replace"))
    else:
        asyncio.get_running_loop().remove_reader(shown.descriptor)


def _set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
