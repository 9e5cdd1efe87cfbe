"""`fedbus events`: what is said on the bus, live, decoded, and listed."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.bus.bus import StoredMessage

app = typer.Typer(no_args_is_help=True, help="Show, replay and decode messages.")


@app.command()
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
    from fedbus.app.bus_session import parse_time, run_async

    beginning = parse_time(since) if since else None

    async def tell() -> None:
        from contextlib import aclosing

        from fedbus.app.bus_session import connect_bus
        from fedbus.app.terminal.event_lines import message_record, render_line
        from fedbus.app.views.event_tail import follow_streams

        left, console = count, output.console()
        async with connect_bus() as bus, aclosing(follow_streams(bus, beginning)) as said:
            async for seen in said:
                if not _matches(seen, task, client, word):
                    continue
                if json:
                    print(output.to_json(message_record(seen)), flush=True)
                else:
                    console.print(render_line(seen, width=console.width))
                left = left - 1 if left is not None else None
                if left == 0:
                    return

    run_async(tell())


@app.command()
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
    from fedbus.app.bus_session import parse_time, run_async

    if since is None and run is None:
        raise CliError("no time window given: set --since 10m or --run RUN", ExitCode.USAGE)
    begin, end = (parse_time(text) if text else None for text in (since, until))
    if begin and end and end < begin:
        raise CliError("--until is before --since", ExitCode.USAGE)

    async def tell() -> None:
        from contextlib import aclosing

        from fedbus.app.bus_session import connect_bus
        from fedbus.app.terminal.event_lines import format_time, message_record, render_line
        from fedbus.app.terminal.progress_bar import progress_bar
        from fedbus.app.views.event_replay import pace, read_window, resolve_window

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
                            print(output.to_json(message_record(seen)), flush=True)
                        else:
                            console.print(render_line(seen, width=console.width))

    run_async(tell())


def _matches(seen: "StoredMessage", task: str | None, client: str | None, word: str | None) -> bool:
    from fedbus.app.terminal.event_lines import message_name

    return (
        (task is None or seen.message.task == task)
        and (client is None or client in seen.subject.split("."))
        and (word is None or word in (seen.message.word, message_name(seen.message)))
    )


@app.command()
def schema(
    word: Annotated[str | None, typer.Argument(help="Message type; default: all.")] = None,
) -> None:
    """Print the JSON Schema of one message type's body, or of all types."""
    from fedbus.app.docs_generator.pages import body_schema, catalogue_entries

    kinds = {entry.word: entry.kind for entry in catalogue_entries()}
    if word is None:
        output.print_json({name: body_schema(kind) for name, kind in kinds.items()})
    elif word in kinds:
        output.print_json(body_schema(kinds[word]))
    else:
        raise CliError(f"no message type {word!r}: see fedbus events catalog", ExitCode.NOT_FOUND)


@app.command()
def decode() -> None:
    """Print the msgpack on standard input as JSON: nats sub '…' --translate 'fedbus events decode'."""
    from fedbus.contracts.envelope import MAX_EVENT_BYTES, unpack

    if sys.stdin.isatty():
        raise CliError(
            "nothing on standard input. Use it so: nats sub 'fedbus.>' --translate 'fedbus events decode'"
        )
    output.print_json(unpack(sys.stdin.buffer.read(MAX_EVENT_BYTES + 1)))


@app.command()
def catalog(*, json: output.JsonOption = False) -> None:
    """List every message type: its subject, publisher and subscribers."""
    from fedbus.app.docs_generator.pages import catalogue_entries

    entries = catalogue_entries()
    if json:
        output.print_json([entry.as_facts() for entry in entries])
        return
    output.print_table(
        ("type", "subject", "source", "subscribers", "data"),
        [(one.word, one.subject, one.said_by, ", ".join(one.heard_by), one.gist) for one in entries],
        empty="no message types",
    )
