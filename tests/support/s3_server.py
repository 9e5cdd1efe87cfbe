"""A real S3 (SeaweedFS), which runs in a thread so that tests on any event loop can use it, and a faulty proxy."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fedbus.app.local.seaweedfs import EmbeddedS3, embedded_s3


@contextmanager
def run_seaweed(directory: Path) -> Iterator[EmbeddedS3]:
    """Run SeaweedFS until the block ends."""
    up = threading.Event()
    found: list[EmbeddedS3] = []
    ends: list[Callable[[], object]] = []

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            async with embedded_s3(directory) as s3:
                found.append(s3)
                ends.append(lambda: loop.call_soon_threadsafe(stop.set))
                up.set()
                await stop.wait()
        finally:
            up.set()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="seaweed")
    thread.start()
    up.wait()
    try:
        yield found[0]
    finally:
        for end in ends:
            end()
        thread.join()


class FaultyProxy:
    """A TCP proxy to a server. Its attributes configure faults."""

    def __init__(self, to_port: int) -> None:
        self._target_port = to_port
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.is_closed = False
        """All connections are closed, and new ones are closed at once."""
        self.truncate_responses_at: list[int] = []
        """For each of the next large responses, the number of bytes after which the connection is closed."""
        self.close_on_request: bytes | None = None
        """A request that contains these bytes closes the proxy."""
        self.response_delay_s = 0.0
        """Delay before each chunk of a response."""
        self.request_delay_s = 0.0
        """Delay before each chunk of a request."""
        self.response_byte_count = 0
        self.request_bytes = bytearray()

    def close(self) -> None:
        self.is_closed = True
        for writer in list(self._open):
            writer.transport.abort()

    def reopen(self) -> None:
        self.is_closed = False

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_closed:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._open |= {writer, back}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward_request(reader, back))
                group.create_task(self._forward_response(there, writer))
        except* (ConnectionError, OSError):
            pass
        finally:
            self._open -= {writer, back}
            for one in (writer, back):
                one.transport.abort()

    async def _forward_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            if self.close_on_request is not None and self.close_on_request in piece:
                self.close()
            self.request_bytes += piece[:2048]
            if self.request_delay_s:
                await asyncio.sleep(self.request_delay_s)
            writer.write(piece)
            await writer.drain()
        writer.write_eof()

    async def _forward_response(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left: int | None = None
        while piece := await reader.read(65536):
            if self.response_delay_s:
                await asyncio.sleep(self.response_delay_s)
            if left is None and self.truncate_responses_at and len(piece) > 4096:
                left = self.truncate_responses_at.pop(0)
            if left is not None:
                piece, left = piece[:left], left - len(piece)
            self.response_byte_count += len(piece)
            writer.write(piece)
            await writer.drain()
            if left is not None and left <= 0:
                raise ConnectionAbortedError
        writer.write_eof()


@asynccontextmanager
async def run_faulty_proxy(to_port: int) -> AsyncIterator[FaultyProxy]:
    """Run a proxy to *to_port* of this machine until the block ends."""
    proxy = FaultyProxy(to_port)
    server = await asyncio.start_server(proxy._handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.close()
        await server.wait_closed()
