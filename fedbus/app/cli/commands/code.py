"""`fedbus code`: the versions of a task's code, and their rollouts."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table
from rich.text import Text

from fedbus.app.bus_session import connect_bus, latest_transitions, resolve_task, run_async, transition_of
from fedbus.app.composition.initial_code import code_address, code_from_settings
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.contracts.client import CLIENT
from fedbus.contracts.code import CODE, LookForCode, RevertCode, RollOutCode
from fedbus.contracts.message import Body, Request
from fedbus.contracts.task.task import STAGE_PATTERN
from fedbus.contracts.transition import Transition
from fedbus.domain.run_participation import short_version
from fedbus.stores.code.address import is_address
from fedbus.stores.code.open import CodeUnavailable, Commit, HistoryRewritten

ReplyT = TypeVar("ReplyT", bound=Body)
TaskId = Annotated[str | None, typer.Option("--task", help="The task's id.", show_default="the only task")]
Source = Annotated[
    str,
    typer.Option(
        "--repo",
        help="The code repository, in the format of `fedbus up --task`.",
        show_default="FEDBUS_TASK, or the one that the server follows",
    ),
]
CHECK_TIMEOUT_S = 900.0
"""For a request that may fetch a version and check it in a process of its own."""
SHORT_LENGTH = 12


def ls(
    *,
    repo: Source = "",
    task: TaskId = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Maximum number of commits.")] = 20,
    json: output.JsonOption = False,
) -> None:
    """List the commits of the followed ref, newest first, with the number of clients on each."""
    facts = _load_status(task)
    commits = _load_commits(repo, facts["source"], limit)
    rows = [
        {
            "code_version": one.sha,
            "where": _rollout_state(one.sha, facts),
            "clients": facts["clients_on"].get(one.sha, 0),
            "subject": one.subject,
            "author": one.author,
            "made": one.committed_at,
        }
        for one in commits
    ]
    if json:
        print_json(rows)
        return
    output.print_table(
        ("version", "state", "clients", "committed", "subject", "author"),
        [
            (
                row["code_version"][:SHORT_LENGTH],
                output.state_text(row["where"]),
                str(row["clients"] or ""),
                output.format_age(row["made"]),
                row["subject"],
                row["author"],
            )
            for row in rows
        ],
        empty=f"the code is a directory, {facts['source']}, and has no commits. "
        "Name a repository: fedbus code ls --repo git+https://host/repo@main",
    )


def status(*, task: TaskId = None, json: output.JsonOption = False) -> None:
    """Show the deployed version, the rollout and its stage, and the rejected versions."""
    facts = _load_status(task)
    if json:
        print_json(facts)
        return
    output.console().print(Text.assemble((facts["task"], "bold"), f" {_describe_source(facts['source'])}"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, text, style in _status_rows(facts):
        grid.add_row(f"  {name}", Text(text, style=style, overflow="fold"))
    output.console().print(grid, soft_wrap=False)


def look(*, task: TaskId = None) -> None:
    """Poll the code repository now, for example in a hook after a push."""
    reply = _send_request(task, lambda name: LookForCode(task=name))
    typer.echo(f"{reply.found[:SHORT_LENGTH]}: {reply.news}")


def rollout(
    version: Annotated[str, typer.Argument(help="A commit: a SHA or its first digits, a tag or a branch.")],
    *,
    task: TaskId = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="A stage: 10% of the clients, or the clients with a label: site=lab. Repeatable, in order."
        ),
    ] = None,
    new_lineage: Annotated[
        bool,
        typer.Option(
            "--new-lineage",
            help="Allow another model architecture; the server creates and serves a first model of it.",
        ),
    ] = False,
) -> None:
    """Roll out a code version to the clients, stage by stage."""
    stages = _parse_stages(stage or [])
    reply = _send_request(
        task,
        lambda name: RollOutCode(task=name, code_version=version, stages=stages, new_lineage=new_lineage),
    )
    typer.echo(
        f"rolling out {reply.code_version[:SHORT_LENGTH]} to {', then '.join(reply.stages)}. See: fedbus code status"
    )


def revert(
    *,
    task: TaskId = None,
    to: Annotated[str, typer.Option(help="The version to deploy.", show_default="the previous one")] = "",
    reason: Annotated[str, typer.Option(help="Reason, which all users can read.")] = "reverted by hand",
) -> None:
    """Cancel the rollout, or without one deploy the previous version."""
    reply = _send_request(task, lambda name: RevertCode(task=name, to=to, reason=reason))
    typer.echo(f"deploying {reply.code_version[:SHORT_LENGTH]} to all clients. See: fedbus code status")


# --- requests and status --------------------------------------------------------------------------


def _parse_stages(stages: list[str]) -> tuple[str, ...]:
    for one in stages:
        if not re.fullmatch(STAGE_PATTERN, one):
            raise CliError(
                f"{one!r} is not a stage. Use a percentage such as 10%, or labels such as site=lab,board=jetson",
                ExitCode.USAGE,
            )
    return tuple(stages)


def _send_request(task: str | None, request: Callable[[str], Request[ReplyT]]) -> ReplyT:
    async def send() -> ReplyT:
        async with connect_bus() as bus:
            message = request(await resolve_task(bus, task))
            with progress_bar(f"waiting for the server of {message.task}, which may check the code first"):
                return await bus.request(message, timeout_s=CHECK_TIMEOUT_S)

    return run_async(send())


def _load_status(task: str | None) -> dict[str, Any]:
    async def load() -> tuple[Transition, list[Transition], Any]:
        async with connect_bus() as bus:
            name = await resolve_task(bus, task)
            code = await latest_transitions(bus, CODE.kind, key=name)
            if not code:
                raise CliError(
                    f"the server of task {name} has published no code version. Check that it is running",
                    ExitCode.NOT_FOUND,
                )
            clients = await latest_transitions(bus, CLIENT.kind, key=f"*.{name}")
            return transition_of(code[0]), [transition_of(one) for one in clients], code[0].envelope.time

    last, clients, since = run_async(load())
    on: Counter[str] = Counter(getattr(one.facts, "code_version", "") for one in clients)
    return {
        **last.facts.model_dump(mode="json"),
        "state": last.target,
        "event": last.event,
        "reason": last.reason,
        "since": since,
        "clients_on": dict(on),
    }


def _rollout_state(version: str, facts: dict[str, Any]) -> str:
    if version == facts["candidate"]:
        return "candidate"
    if version == facts["code_version"]:
        return "current"
    if version in facts["rejected"]:
        return "rejected"
    return "previous" if version in facts["previous"][:1] else ""


def _describe_source(source: str) -> str:
    return (
        f"follows {source}"
        if is_address(source)
        else f"does not follow a repository; its code is the directory {source}"
    )


def _status_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Return the rows of the status: heading, text and style."""
    on = facts["clients_on"]
    heading = "other clients" if facts["candidate"] else "all clients"
    yield (
        heading,
        f"{short_version(facts['code_version'])}{_client_count(on.get(facts['code_version'], 0))}",
        "",
    )
    if facts["candidate"]:
        yield "candidate", f"{short_version(facts['candidate'])}, {_describe_stage(facts)}", "yellow"
    if facts["held_up"]:
        yield "paused", f"no new code: {facts['held_up']}", "red"
    for version, count in sorted(on.items(), key=lambda one: -one[1]):
        if version not in (facts["code_version"], facts["candidate"]):
            yield "still on", f"{short_version(version)}{_client_count(count)}", "yellow"
    for client, reason in facts["refused"].items():
        yield "refused", f"{client}: {reason}", "red"
    for version, reason in reversed(facts["rejected"].items()):
        yield "rejected", f"{short_version(version)}: {reason}", "red"
    yield (
        "last event",
        f"{facts['event']} {output.format_age(facts['since'])}{_reason_suffix(facts['reason'])}",
        "dim",
    )


def _describe_stage(facts: dict[str, Any]) -> str:
    total = len(facts["clients"])
    done = facts["clients_on"].get(facts["candidate"], 0)
    return (
        f"stage {facts['stage'] + 1} of {len(facts['stages'])} ({facts['stages'][facts['stage']]}): "
        f"{min(done, total)} of {total} clients have it"
    )


def _client_count(clients: int) -> str:
    return f" · {pluralize(clients, 'client')}"


def _reason_suffix(reason: str) -> str:
    return f": {reason}" if reason else ""


def _load_commits(repo: str, source: str, limit: int) -> list[Commit]:
    settings = Settings.from_environment()
    code = code_from_settings(settings, repo or code_address(settings, source))
    if not code.can_update:
        return []

    async def read() -> list[Commit]:
        try:
            await code.fetch_latest()
        except (CodeUnavailable, HistoryRewritten) as error:
            typer.echo(f"fedbus: {error}", err=True)
        return await code.list_commits(limit)

    with progress_bar(f"reading the history of {code.source}"):
        return asyncio.run(read())
