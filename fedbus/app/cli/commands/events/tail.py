"""`fedbus events tail` and `replay`: events and transitions, live or stored."""

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
from fedbus.bus.stream_reader import StoredMessage


def tail(
    *,
    since: Annotated[
        str | None, typer.Option(help="Start in the past: 90s, 10m, 2h or 1d ago, or an ISO 8601 time.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    name: Annotated[
        str | None, typer.Option("--type", help="Only this message type or lifecycle kind.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Exit after this number of messages.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Show events and transitions live, one per line."""
    start = parse_time(since) if since else None

    async def follow() -> None:
        left, console = count, output.console()
        async with connect_bus() as bus, aclosing(follow_streams(bus, start)) as messages:
            async for stored in messages:
                if not _matches(stored, task, client, name):
                    continue
                if json:
                    print(to_json(message_record(stored)), flush=True)
                else:
                    console.print(render_line(stored, width=console.width))
                left = left - 1 if left is not None else None
                if left == 0:
                    return

    run_async(follow())


def replay(
    *,
    since: Annotated[
        str | None, typer.Option(help="Start of the window: 90s, 10m, 2h or 1d ago, or an ISO 8601 time.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="End of the window, in the same formats.", show_default="now")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Only this run; the window is from its request to its end.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    name: Annotated[
        str | None, typer.Option("--type", help="Only this message type or lifecycle kind.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0, help="Speed factor, 1 for the original speed; 0: without pauses.")
    ] = 0,
    json: output.JsonOption = False,
) -> None:
    """Print the stored messages of a time window, in order; nothing is published."""
    if since is None and run is None:
        raise CliError("no time window. Set --since 10m or --run RUN", ExitCode.USAGE)
    first, last = (parse_time(text) if text else None for text in (since, until))
    if first and last and last < first:
        raise CliError("--until is before --since", ExitCode.USAGE)

    async def read() -> None:
        console = output.console()
        lines_at = console if console.is_terminal else None
        async with connect_bus() as bus:
            window = await resolve_window(bus, first, last, run)
            with progress_bar("replaying", console=lines_at, wanted=not (json and lines_at)) as step:
                async with aclosing(pace(read_window(bus, window), speed)) as messages:
                    async for stored in messages:
                        step(
                            1,
                            f"messages of {format_time(stored.envelope.time)}, until {format_time(window.until)}",
                        )
                        if not _matches(stored, task, client, name):
                            continue
                        if json:
                            print(to_json(message_record(stored)), flush=True)
                        else:
                            console.print(render_line(stored, width=console.width))

    run_async(read())


def _matches(stored: StoredMessage, task: str | None, client: str | None, name: str | None) -> bool:
    return (
        (task is None or stored.message.task == task)
        and (client is None or client in stored.subject.split("."))
        and (name is None or name in (stored.message.name, message_name(stored.message)))
    )
