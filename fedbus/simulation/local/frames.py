"""Frames between processes over a socket: a pickled object, then bytes that are not pickled.

    length of the object (4 bytes), length of the bytes (8 bytes), little-endian · the object · the bytes

Both sides are processes of one simulation and of one user, so the object is trusted.
"""

import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

HEADER: Final = struct.Struct("<IQ")
READ_BYTES: Final = 1024**2
MAX_BUFFERS: Final = 512
"""Buffers of one system call: the limit of Linux is 1,024."""


class PeerClosed(ConnectionError):
    """The other process has closed the socket, or has died."""


def dump(value: object, blobs: Sequence[bytes | memoryview] = ()) -> list[bytes | memoryview]:
    """Return the buffers of a frame with *value* and *blobs*, which follow each other."""
    body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return [HEADER.pack(len(body), sum(map(len, blobs))) + body, *blobs]


def send(sock: socket.socket, buffers: Sequence[bytes | memoryview]) -> None:
    """Send *buffers* completely. Blocks. Raises PeerClosed."""
    views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    try:
        while views:
            sent = sock.sendmsg(views[:MAX_BUFFERS])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]
    except (BrokenPipeError, ConnectionResetError):
        raise PeerClosed("the other process has ended") from None


class FrameReader:
    """Reads frames from a socket, with the file descriptors that came with them. Blocking or not, as the socket is."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._header = bytearray(HEADER.size)
        self._frame: bytearray | None = None
        self._body_size = 0
        self._filled = 0
        self.descriptors: list[int] = []
        """Received and not yet taken, in order."""

    def read(self) -> tuple[Any, memoryview] | None:
        """Return the next frame, its object and its bytes; None if the socket has no more data at the moment.

        Raises:
            PeerClosed: the other side has closed the socket.

        """
        while True:
            target = self._header if self._frame is None else self._frame
            if self._filled < len(target):
                count = self._receive(memoryview(target)[self._filled :])
                if count is None:
                    return None
                self._filled += count
                continue
            self._filled = 0
            if self._frame is None:
                self._body_size, blob_size = HEADER.unpack(self._header)
                self._frame = bytearray(self._body_size + blob_size)
                continue
            frame, self._frame = memoryview(self._frame), None
            return pickle.loads(frame[: self._body_size]), frame[self._body_size :]  # noqa: S301 - see above

    def _receive(self, target: memoryview) -> int | None:
        try:
            count, ancillary, _, _ = self._sock.recvmsg_into([target], socket.CMSG_SPACE(16))
        except BlockingIOError:
            return None
        except ConnectionResetError:
            count, ancillary = 0, []
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(data) - len(data) % 4
                self.descriptors += struct.unpack(f"{whole // 4}i", data[:whole])
        if not count:
            raise PeerClosed("the other process has ended")
        return count
