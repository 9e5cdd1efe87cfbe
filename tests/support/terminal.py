"""A pseudo-terminal for a command, and the screen that the command draws."""

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
    """The output of a command so far, and its keyboard."""

    process: asyncio.subprocess.Process
    descriptor: int
    chunks: list[str] = field(default_factory=list)

    @property
    def raw(self) -> str:
        return "".join(self.chunks)

    @property
    def lines(self) -> list[str]:
        """The last complete screen, without colors."""
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
    """Run `fedbus` with the arguments *words* on a terminal, and kill it when the block ends."""
    master, slave = pty.openpty()
    _set_size(master, columns, rows)
    clean = {
        name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedbus.app.cli.main",
        *words,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=clean | {"TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    terminal = Terminal(process, master)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, _read, terminal)
    try:
        yield terminal
    finally:
        loop.remove_reader(master)
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(master)


def _read(terminal: Terminal) -> None:
    try:
        output = os.read(terminal.descriptor, 65536)
    except OSError:  # the command has closed its end
        output = b""
    if output:
        terminal.chunks.append(output.decode(errors="replace"))
    else:
        asyncio.get_running_loop().remove_reader(terminal.descriptor)


def _set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
