"""The whole of fedbus on one machine: the bus, the server's process, and a process for each client.

The model repository is a directory, or where that is asked for an S3 of this machine's own.

    async with stack(settings, task, clients=3) as running:
        ...

Each process is kept: one that ends by itself is started again, later each time, as a
supervisor would. All end with the block, and with us, however we end.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from fedbus.agents.common.asyncio_tools import backoff_s, wait_for_first
from fedbus.agents.common.child_process import ChildProcess, describe_exit, log_tail, module_command
from fedbus.app.local.nats_server import EmbeddedNats, embedded_nats
from fedbus.app.local.seaweedfs import embedded_s3
from fedbus.app.local.supervisor import HOST, PortTaken, bind_port
from fedbus.app.settings import NATS_MONITOR, Settings
from fedbus.contracts.identifiers import ClientId, client_id

CLI_MODULE: Final = "fedbus.app.cli.main"
DEFAULT_DASHBOARD_PORT: Final = 8765
"""Of the dashboard, where nobody else has it."""
EMBEDDED_STORE: Final = "s3"
"""The model repository is to lie in an S3 that is started here."""
SUPERVISED_VARIABLE: Final = "FEDBUS_KEPT"
"""Tells a process that its standard input is the life line of whoever keeps it."""
GATEWAY_SOCKET_VARIABLE: Final = "FEDBUS_GATEWAY_SOCKET"
"""Tells the gateway the number of the socket that its keeper has bound for it."""

log = structlog.get_logger("fedbus.stack")


@dataclass
class LocalStack:
    """What runs."""

    nats: EmbeddedNats
    clients: list[ClientId]
    home: Path
    store_url: str
    dashboard: str = ""
    """Where it is, if there is one."""
    restarts: dict[str, str] = field(default_factory=dict)
    """Processes that ended by themselves, and how."""

    def log_of(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"


@asynccontextmanager
async def run_stack(
    settings: Settings,
    tasks: Sequence[str],
    *,
    clients: int,
    port: int | None = None,
    server_options: Sequence[str] = (),
    store: str = "",
    public_models: bool = False,
    dashboard: bool = False,
) -> AsyncIterator[LocalStack]:
    """Everything up, for as long as the block runs. *server_options* go to `fedbus server up`.

    *tasks*: directories, or addresses of Git repositories that are followed. *store*: the model repository, ``s3``
    for an S3 that is started here; with *public_models* anybody may read that one.
    """
    these = [part for task in tasks for part in ("--task", task)]
    names = [client_id(f"c{number}") for number in range(1, clients + 1)]
    async with AsyncExitStack() as open_things:
        door = open_things.enter_context(bind_dashboard_socket(settings.gateway_port)) if dashboard else None
        nats = await open_things.enter_async_context(embedded_nats(settings.nats_dir, port))
        store_url = store or settings.configured_store or str(settings.home / "models")
        key: dict[str, str] = {}
        if store == EMBEDDED_STORE:
            s3 = await open_things.enter_async_context(
                embedded_s3(settings.s3_dir, public_models=public_models)
            )
            store_url, key = s3.store_url, s3.environment
        running = LocalStack(nats, names, settings.home, store_url)
        environment = {
            SUPERVISED_VARIABLE: "1",
            "FEDBUS_HOME": str(settings.home),
            "FEDBUS_NATS_URL": nats.url,
            "FEDBUS_FEDERATION": settings.federation,
            "FEDBUS_DATA_DIR": str(settings.data_dir),
        }
        with settings.announce_url(nats.url), settings.announce_store(store_url):
            async with asyncio.TaskGroup() as group:
                stop = asyncio.Event()
                commands: dict[str, tuple[str, ...]] = {
                    "server": ("server", "up", *these, "--store", store_url, *server_options)
                }
                if door is not None:
                    at = door.getsockname()[1]
                    commands["gateway"] = ("gateway", "--host", HOST, "--port", str(at))
                    running.dashboard = f"http://{HOST}:{at}"
                for number, name in enumerate(names):
                    config = json.dumps({"partition-id": number, "num-partitions": clients})
                    commands[name] = ("client", "up", name, *these, "--node-config", config)
                for process, command in commands.items():
                    of_server = key | {NATS_MONITOR: nats.monitor_url}  # no client needs them
                    its_own = environment | (of_server if process in ("server", "gateway") else {})
                    of_gateway = door if process == "gateway" else None
                    group.create_task(
                        _supervise(running, process, command, its_own, stop, door=of_gateway), name=process
                    )
                try:
                    yield running
                finally:
                    stop.set()


def is_supervised() -> bool:
    """Whether this process was started by a stack."""
    return bool(os.environ.pop(SUPERVISED_VARIABLE, ""))


def inherited_socket() -> socket.socket | None:
    """The socket that a stack has bound for this process, if it has."""
    number = os.environ.pop(GATEWAY_SOCKET_VARIABLE, "")
    return socket.socket(fileno=int(number)) if number else None


def bind_dashboard_socket(asked: int | None) -> socket.socket:
    """Where the dashboard is: bound before it is announced and held to the end, so that nobody else is there.

    On the port that was *asked* for, 0 for any, else on the usual one where nobody has it. Raises PortTaken.
    """
    if asked is not None:
        try:
            return bind_port(asked)
        except PortTaken:
            raise PortTaken(asked, "set FEDBUS_GATEWAY_PORT to another, 0 for any") from None
    with suppress(PortTaken):
        return bind_port(DEFAULT_DASHBOARD_PORT)
    return bind_port(0)


async def _supervise(
    running: LocalStack,
    name: str,
    command: tuple[str, ...],
    environment: Mapping[str, str],
    stop: asyncio.Event,
    *,
    door: socket.socket | None = None,
) -> None:
    """Run the process *name* until *stop*; start it again when it ends by itself. *door*: the socket it listens on."""
    attempt = 0
    doors = [] if door is None else [door.fileno()]
    its_own = environment if door is None else {**environment, GATEWAY_SOCKET_VARIABLE: str(door.fileno())}
    while not stop.is_set():
        child = ChildProcess(
            name,
            *module_command(CLI_MODULE, *command),
            environment=its_own,
            output=running.log_of(name),
            handed_down=doors,
        )
        async with child:
            await wait_for_first(child.ended(), stop.wait())
            code = child.returncode
        if stop.is_set():
            return
        ended = f"{describe_exit(code or 0)}: {log_tail(running.log_of(name), 1)}"
        running.restarts[name] = ended
        log.warning("started again", process=name, because=ended)
        await wait_for_first(stop.wait(), asyncio.sleep(backoff_s(attempt)))
        attempt += 1
