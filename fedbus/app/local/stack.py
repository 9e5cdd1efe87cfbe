"""A whole federation on one machine: nats-server, a process for the server side, and one for each client.

The model repository is a directory or an embedded S3.

    async with run_stack(settings, tasks, clients=3) as stack:
        ...

A process that ends by itself is restarted, with backoff. All processes end with the block, and with this process
even if it is killed.
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import ChildProcess, describe_exit, log_tail, module_command
from fedbus.app.local.nats_server import EmbeddedNats, embedded_nats
from fedbus.app.local.seaweedfs import embedded_s3
from fedbus.app.local.supervisor import HOST, PortTaken, bind_port
from fedbus.app.settings import NATS_MONITOR, Settings
from fedbus.app.telemetry.log_lines import plain_text
from fedbus.common.retry import RetryBackoff
from fedbus.contracts.identifiers import ClientId, client_id

CLI_MODULE: Final = "fedbus.app.cli.main"
DEFAULT_DASHBOARD_PORT: Final = 8765
"""The port of the dashboard, if it is free."""
EMBEDDED_STORE: Final = "s3"
"""The value of *store* that selects the embedded S3."""
SUPERVISED_VARIABLE: Final = "FEDBUS_KEPT"
"""Set for a process whose standard input is a pipe from its supervisor: it ends when the pipe closes."""
GATEWAY_SOCKET_VARIABLE: Final = "FEDBUS_GATEWAY_SOCKET"
"""The file descriptor of the socket that the supervisor has bound for the gateway."""
PROFILE_START_VARIABLE: Final = "FEDBUS_PROFILE_START"
"""Time 0 of a profile, in seconds of the epoch: the same for all clients, and for a client that is restarted."""
THREADS_VARIABLE: Final = "OMP_NUM_THREADS"
"""The number of threads of OpenBLAS, MKL and torch."""

log = structlog.get_logger("fedbus.stack")


@dataclass
class LocalStack:
    """The state of a running stack."""

    nats: EmbeddedNats
    clients: list[ClientId]
    home: Path
    store_url: str
    dashboard: str = ""
    """URL; empty without a dashboard."""
    restarts: dict[str, str] = field(default_factory=dict)
    """Restarted processes, each with its exit and the last line of its log."""

    def log_path(self, name: str) -> Path:
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
    client_options: Mapping[str, Sequence[str]] | None = None,
) -> AsyncIterator[LocalStack]:
    """Run a federation until the block ends.

    *tasks* are directories, or addresses of Git repositories. *port* is that of nats-server; None chooses the one of
    the last start, or a free one. *server_options* are options of `fedbus server up`. *store* is the model repository,
    or ``s3`` for the embedded S3; with *public_models*, everyone may read the models in that. *client_options* are
    further options of `fedbus client up`, by client.
    """
    task_options = [part for task in tasks for part in ("--task", task)]
    names = client_names(clients)
    async with AsyncExitStack() as exits:
        gateway_socket = (
            exits.enter_context(bind_dashboard_socket(settings.gateway_port)) if dashboard else None
        )
        nats = await exits.enter_async_context(embedded_nats(settings.nats_dir, port))
        store_url = store or settings.configured_store or str(settings.home / "models")
        credentials: dict[str, str] = {}
        if store == EMBEDDED_STORE:
            s3 = await exits.enter_async_context(embedded_s3(settings.s3_dir, public_models=public_models))
            store_url, credentials = s3.store_url, s3.environment
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
                    "server": ("server", "up", *task_options, "--store", store_url, *server_options)
                }
                if gateway_socket is not None:
                    gateway_port = gateway_socket.getsockname()[1]
                    commands["gateway"] = ("gateway", "--host", HOST, "--port", str(gateway_port))
                    running.dashboard = f"http://{HOST}:{gateway_port}"
                for number, name in enumerate(names):
                    config = json.dumps({"partition-id": number, "num-partitions": clients})
                    options = (client_options or {}).get(name, ())
                    commands[name] = ("client", "up", name, *task_options, "--node-config", config, *options)
                server_environment = environment | credentials | {NATS_MONITOR: nats.monitor_url}
                client_environment = environment | thread_limits(clients)
                client_environment[PROFILE_START_VARIABLE] = repr(time.time())
                for process, command in commands.items():
                    is_server_side = process in ("server", "gateway")
                    supervise = _supervise(
                        running,
                        process,
                        command,
                        server_environment if is_server_side else client_environment,
                        stop,
                        inherited=gateway_socket if process == "gateway" else None,
                    )
                    group.create_task(supervise, name=process)
                try:
                    yield running
                finally:
                    stop.set()


def client_names(count: int) -> list[ClientId]:
    """Return the names of the clients: ``c1``, ``c2`` …"""
    return [client_id(f"c{number}") for number in range(1, count + 1)]


def thread_limits(clients: int) -> dict[str, str]:
    """Return the environment that divides the cores of this machine among the threads of the *clients*' libraries.

    OpenBLAS, MKL and torch use all cores by default. Several clients on one machine would slow each other down: a small
    network in NumPy trains ten times slower on three clients and two cores. fedbus keeps a limit that the user has set.
    """
    if THREADS_VARIABLE in os.environ:
        return {}
    return {THREADS_VARIABLE: str(max(1, (os.cpu_count() or 1) // max(1, clients)))}


def is_supervised() -> bool:
    """Return whether `run_stack` started this process."""
    return bool(os.environ.pop(SUPERVISED_VARIABLE, ""))


def profile_start_time() -> float | None:
    """Return time 0 of the profiles of all clients, if `run_stack` started this process."""
    text = os.environ.pop(PROFILE_START_VARIABLE, "")
    return float(text) if text else None


def inherited_socket() -> socket.socket | None:
    """Return the socket that `run_stack` has bound for this process, if any."""
    number = os.environ.pop(GATEWAY_SOCKET_VARIABLE, "")
    return socket.socket(fileno=int(number)) if number else None


def bind_dashboard_socket(port: int | None) -> socket.socket:
    """Bind the socket of the dashboard before its URL is announced, so that no other process can take the port.

    *port* is 0 for a free port; None for the default port, or a free one if that is taken.

    Raises:
        PortTaken: Another process has *port*.

    """
    if port is not None:
        try:
            return bind_port(port)
        except PortTaken:
            raise PortTaken(port, "set FEDBUS_GATEWAY_PORT to another port, or 0 for a free one") from None
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
    inherited: socket.socket | None = None,
) -> None:
    """Run the process *name* until *stop*, and restart it when it ends. It inherits the socket *inherited*."""
    backoff = RetryBackoff()
    descriptors = [] if inherited is None else [inherited.fileno()]
    if inherited is not None:
        environment = {**environment, GATEWAY_SOCKET_VARIABLE: str(inherited.fileno())}
    while not stop.is_set():
        child = ChildProcess(
            name,
            *module_command(CLI_MODULE, *command),
            environment=environment,
            output=running.log_path(name),
            inherited_fds=descriptors,
        )
        async with child:
            await wait_for_first(child.wait(), stop.wait())
            code = child.returncode
        if stop.is_set():
            return
        reason = f"{describe_exit(code or 0)}: {plain_text(log_tail(running.log_path(name), 1))}"
        running.restarts[name] = reason
        log.warning("Process ended; restarting", process=name, reason=reason)
        await backoff.pause(stop)
