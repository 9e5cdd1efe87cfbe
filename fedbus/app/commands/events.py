"""`fedbus events`: what is said on the bus, live, decoded, and listed."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedbus.app import show
from fedbus.app.edge import Failure

if TYPE_CHECKING:
    from fedbus.bus.bus import Bus, Seen

app = typer.Typer(no_args_is_help=True, help="What is said on the bus: live, decoded, and listed.")

SETTLE_S: Final = 0.05
"""Two streams are read as one: what comes within this time is put in the order of its time."""
HELD_AT_ONCE: Final = 1000


@app.command()
def tail(
    *,
    since: Annotated[
        str | None, typer.Option(help="Begin in the past: 90s, 10m, 2h, 1d, or a time as ISO 8601.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    word: Annotated[str | None, typer.Option(help="Only this word, or kind of lifecycle.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    json: show.AsJson = False,
) -> None:
    """Show events and transitions as they happen, one a line."""
    from fedbus.app.session import moment, now

    def wanted(seen: "Seen") -> bool:
        from fedbus.app.lines import word_of

        return (
            (task is None or seen.message.task == task)
            and (client is None or client in seen.subject.split("."))
            and (word is None or word in (seen.message.word, word_of(seen.message)))
        )

    async def tell() -> None:
        from fedbus.app.lines import line, record
        from fedbus.app.session import on_the_bus

        left, console = count, show.console()
        async with on_the_bus() as bus:
            async for seen in _all(bus, moment(since) if since else None):
                if not wanted(seen):
                    continue
                if json:
                    print(show.to_json(record(seen)), flush=True)
                else:
                    console.print(line(seen))
                left = left - 1 if left is not None else None
                if left == 0:
                    return

    now(tell())


async def _all(bus: "Bus", since: datetime | None) -> "AsyncIterator[Seen]":
    """Both streams as one, in the order of their times; ends with BusClosed only."""
    from fedbus.bus.streams import events_stream, life_stream
    from fedbus.contracts import subjects
    from fedbus.contracts.catalogue import stream_subjects

    streams = {
        events_stream(bus.fed): stream_subjects(bus.fed),
        life_stream(bus.fed): [subjects.life(bus.fed, "*", ">")],
    }
    queue: asyncio.Queue[Seen] = asyncio.Queue(HELD_AT_ONCE)
    async with AsyncExitStack() as watching:
        readers = [
            asyncio.create_task(_into(queue, await watching.enter_async_context(watch)), name="read a stream")
            for watch in (bus.watch(stream, wanted, since=since) for stream, wanted in streams.items())
        ]
        readers.append(asyncio.ensure_future(bus.lost()))
        try:
            while True:
                for seen in await _settled(queue, readers):
                    yield seen
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)


async def _into(queue: "asyncio.Queue[Seen]", stream: "AsyncIterator[Seen]") -> None:
    async for seen in stream:
        await queue.put(seen)


async def _settled(queue: "asyncio.Queue[Seen]", readers: "list[asyncio.Task[None]]") -> "list[Seen]":
    """What comes until nothing has come for a moment, sorted by time."""
    first = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait([first, *readers], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not first.done():
            first.cancel()
    for reader in readers:
        if reader.done():
            reader.result()
    held = [await first]
    with suppress(TimeoutError):
        while len(held) < HELD_AT_ONCE:
            held.append(await asyncio.wait_for(queue.get(), SETTLE_S))
    return sorted(held, key=lambda seen: seen.envelope.time)


@app.command()
def decode() -> None:
    """Print the msgpack on standard input as JSON: nats sub '…' --translate 'fedbus events decode'."""
    from fedbus.contracts.envelope import MAX_EVENT_BYTES, unpack

    if sys.stdin.isatty():
        raise Failure(
            "nothing on standard input. Use it so: nats sub 'fedbus.>' --translate 'fedbus events decode'"
        )
    show.as_json(unpack(sys.stdin.buffer.read(MAX_EVENT_BYTES + 1)))


@app.command()
def catalog(*, json: show.AsJson = False) -> None:
    """List every kind of message: its word, its subject, who says it and who hears it."""
    from fedbus.app.pages import catalogue

    entries = catalogue()
    if json:
        show.as_json([entry.as_facts() for entry in entries])
        return
    show.table(
        ("word", "subject", "said by", "heard by", "what it says"),
        [(one.word, one.subject, one.said_by, ", ".join(one.heard_by), one.gist) for one in entries],
        empty="nothing is ever said",
    )
