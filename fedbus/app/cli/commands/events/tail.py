"""`fedbus events tail` and `replay`: the messages on the bus, live or stored."""

from contextlib import aclosing
from typing import Annotated

import typer

from fedbus.app.bus_session import connect_bus, parse_time, run_async
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.event_lines import format_time, message_name, message_record, render_line
from fedbus.app.terminal.plain import to_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.app.views.event_replay import pace, read_window, resolve_window
from fedbus.app.views.event_tail import follow_streams
from fedbus.bus.bus import StoredMessage


def tail(
    *,
    since: Annotated[
        str | None, typer.Option(help="Begin in the past: 90s, 10m, 2h, 1d, or a time as ISO 8601.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    word: Annotated[str | None, typer.Option(help="Only this message type or lifecycle kind.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Show events and transitions as they happen, one a line."""
    beginning = parse_time(since) if since else None

    async def tell() -> None:
        left, console = count, output.console()
        async with connect_bus() as bus, aclosing(follow_streams(bus, beginning)) as said:
            async for seen in said:
                if not _matches(seen, task, client, word):
                    continue
                if json:
                    print(to_json(message_record(seen)), flush=True)
                else:
                    console.print(render_line(seen, width=console.width))
                left = left - 1 if left is not None else None
                if left == 0:
                    return

    run_async(tell())


def replay(
    *,
    since: Annotated[
        str | None, typer.Option(help="From then on: 90s, 10m, 2h or 1d ago, or a time as ISO 8601.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Until then.", show_default="run_async")] = None,
    run: Annotated[str | None, typer.Option(help="Only this run, from its request to its end.")] = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    word: Annotated[str | None, typer.Option(help="Only this message type or lifecycle kind.")] = None,
    speed: Annotated[float, typer.Option(min=0, help="So many times as fast as it was; 0: all at once.")] = 0,
    json: output.JsonOption = False,
) -> None:
    """Print the stored messages of a time window, in order. Publishes nothing."""
    if since is None and run is None:
        raise CliError("no time window given: set --since 10m or --run RUN", ExitCode.USAGE)
    begin, end = (parse_time(text) if text else None for text in (since, until))
    if begin and end and end < begin:
        raise CliError("--until is before --since", ExitCode.USAGE)

    async def tell() -> None:
        console = output.console()
        lines_at = console if console.is_terminal else None
        async with connect_bus() as bus:
            asked = await resolve_window(bus, begin, end, run)
            with progress_bar("replaying", console=lines_at, wanted=not (json and lines_at)) as step:
                async with aclosing(pace(read_window(bus, asked), speed)) as said:
                    async for seen in said:
                        step(
                            1,
                            f"what was said at {format_time(seen.envelope.time)}, until {format_time(asked.until)}",
                        )
                        if not _matches(seen, task, client, word):
                            continue
                        if json:
                            print(to_json(message_record(seen)), flush=True)
                        else:
                            console.print(render_line(seen, width=console.width))

    run_async(tell())


def _matches(seen: StoredMessage, task: str | None, client: str | None, word: str | None) -> bool:
    return (
        (task is None or seen.message.task == task)
        and (client is None or client in seen.subject.split("."))
        and (word is None or word in (seen.message.word, message_name(seen.message)))
    )
