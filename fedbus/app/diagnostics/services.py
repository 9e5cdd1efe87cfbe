"""The checks of `fedbus doctor` beyond the machine and the bus: model repository, code repository and agents."""

import asyncio
from collections.abc import Sequence
from typing import Final

from fedbus.app.finding import DoctorFinding, Severity
from fedbus.app.settings import Settings
from fedbus.bus.bus import ServiceInfo
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.address import is_address
from fedbus.stores.code.interface import GitNotInstalled, InvalidCodeSource
from fedbus.stores.code.open import open_code
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import list_tasks

STORE_TIMEOUT_S: Final = 3.0
"""The retry budget for a remote model repository."""
CODE_TIMEOUT_S: Final = 15.0
SERVER_AGENT_NAMES: Final = (
    AgentName.REGISTRAR,
    AgentName.SERVER_MANAGER,
    AgentName.WORKFLOW_SCHEDULER,
    AgentName.FLOWER_SERVER,
    AgentName.TRAINING_MONITOR,
)
GATEWAY_NAME: Final = AgentName.GATEWAY
CLIENT_MANAGER_NAME: Final = AgentName.CLIENT_MANAGER


async def check_repositories(settings: Settings) -> list[DoctorFinding]:
    """Check the configured model repository and code repository; a local default directory needs no check."""
    store = [await _check_store(settings)] if settings.configured_store and not settings.client else []
    return store + ([await _check_code(settings)] if is_address(settings.task) else [])


async def _check_store(settings: Settings) -> DoctorFinding:
    url = settings.store_url
    try:
        tasks = await list_tasks(url, patience_s=STORE_TIMEOUT_S)
    except (StoreError, OSError) as error:
        return DoctorFinding(
            "models", Severity.ERROR, str(error), "check FEDBUS_STORE; until then no run can store a model"
        )
    content = f"models of {', '.join(tasks)}" if tasks else "no models yet"
    return DoctorFinding("models", Severity.OK, f"{url}: {content}")


async def _check_code(settings: Settings) -> DoctorFinding:
    try:
        code = open_code(
            settings.task,
            settings.home,
            open_library,
            signers=settings.allowed_signers,
            allow_install=settings.allowed_installs,
        )
        async with asyncio.timeout(CODE_TIMEOUT_S):
            newest = await code.fetch_latest()
    except TimeoutError:
        advice = "check FEDBUS_TASK, and whether this machine can reach the repository"
        return DoctorFinding(
            "code", Severity.ERROR, f"{settings.task}: no answer within {CODE_TIMEOUT_S:g} s", advice
        )
    except (StoreError, InvalidCodeSource, GitNotInstalled) as error:
        return DoctorFinding(
            "code",
            Severity.ERROR,
            str(error),
            "check FEDBUS_TASK; until then this machine gets no new commits",
        )
    found = f"{settings.task}, newest commit {newest[:12]}"
    if settings.allowed_signers is None:
        advice = "set FEDBUS_ALLOWED_SIGNERS; without it, fedbus runs commits of any author"
        return DoctorFinding("code", Severity.WARNING, f"{found}, not verified", advice)
    return DoctorFinding("code", Severity.OK, f"{found}, signed by a key in {settings.allowed_signers}")


def check_agents(agents: Sequence[ServiceInfo]) -> list[DoctorFinding]:
    """Check which of the federation's agents are running. *agents*: those that have replied."""
    server = {one.name.removeprefix("fedbus-") for one in agents if one.owner == SERVER_SIDE}
    clients = {one.owner for one in agents if one.name == f"fedbus-{CLIENT_MANAGER_NAME}"}
    return [
        _check_server_agents(server),
        _check_clients(len(clients)),
        _check_dashboard(is_running=GATEWAY_NAME in server),
    ]


def _check_server_agents(running: set[str]) -> DoctorFinding:
    missing = [name for name in SERVER_AGENT_NAMES if name not in running]
    if not missing:
        return DoctorFinding("server's agents", Severity.OK, f"all running: {', '.join(SERVER_AGENT_NAMES)}")
    if len(missing) == len(SERVER_AGENT_NAMES):
        return DoctorFinding(
            "server's agents", Severity.WARNING, "none is running", "start them: fedbus server up"
        )
    advice = "check the log of its process, or start it: fedbus agent NAME"
    return DoctorFinding("server's agents", Severity.ERROR, f"no answer from {', '.join(missing)}", advice)


def _check_clients(count: int) -> DoctorFinding:
    if count:
        return DoctorFinding("devices", Severity.OK, f"{count} running")
    return DoctorFinding("devices", Severity.WARNING, "none is running", "start one: fedbus client up ID")


def _check_dashboard(*, is_running: bool) -> DoctorFinding:
    if is_running:
        return DoctorFinding("dashboard", Severity.OK, "running")
    return DoctorFinding("dashboard", Severity.WARNING, "not running", "to start it: fedbus gateway")
