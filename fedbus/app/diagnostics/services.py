"""What a fedbus leans on beyond its machine and its bus: the model repository, the code, who else is at work.

Findings for `fedbus doctor`, each in plain words with what to do.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from fedbus.app.finding import DoctorFinding, Severity
from fedbus.app.settings import Settings
from fedbus.bus.bus import ServiceInfo
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.stores.code.address import is_address
from fedbus.stores.code.interface import GitNotInstalled, InvalidCodeSource
from fedbus.stores.code.open import open_code
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import list_tasks

STORE_TIMEOUT_S: Final = 3.0
"""How long a repository that is afar is asked."""
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
    """The model repository and the code, where they are named: what is only a folder of our own is here anyway."""
    store = [await _check_store(settings)] if settings.configured_store and not settings.client else []
    return store + ([await _check_code(settings)] if is_address(settings.task) else [])


async def _check_store(settings: Settings) -> DoctorFinding:
    url = settings.store_url
    try:
        tasks = await list_tasks(url, patience_s=STORE_TIMEOUT_S)
    except (StoreError, OSError) as error:
        return DoctorFinding(
            "models", Severity.ERROR, str(error), "see FEDBUS_STORE; no run can keep a model until then"
        )
    held = f"models of {', '.join(tasks)}" if tasks else "no models yet"
    return DoctorFinding("models", Severity.OK, f"{url}: {held}")


async def _check_code(settings: Settings) -> DoctorFinding:
    try:
        code = open_code(
            settings.task,
            settings.home,
            signers=settings.allowed_signers,
            allow_install=settings.allowed_installs,
        )
        async with asyncio.timeout(CODE_TIMEOUT_S):
            newest = await code.fetch_latest()
    except TimeoutError:
        advice = "see whether this machine reaches it, and FEDBUS_TASK"
        return DoctorFinding(
            "code", Severity.ERROR, f"{settings.task}: no answer within {CODE_TIMEOUT_S:g} s", advice
        )
    except (StoreError, InvalidCodeSource, GitNotInstalled) as error:
        return DoctorFinding(
            "code", Severity.ERROR, str(error), "see FEDBUS_TASK; no new commit comes here until then"
        )
    found = f"{settings.task}, newest commit {newest[:12]}"
    if settings.allowed_signers is None:
        advice = "name who may sign commits in FEDBUS_ALLOWED_SIGNERS: until then anybody's are run"
        return DoctorFinding("code", Severity.WARNING, f"{found}, not verified", advice)
    return DoctorFinding("code", Severity.OK, f"{found}, signed by those in {settings.allowed_signers}")


def check_agents(answering: Sequence[ServiceInfo]) -> list[DoctorFinding]:
    """Who is at work in the federation, and who should be and is not."""
    server = {one.name.removeprefix("fedbus-") for one in answering if one.owner == SERVER_SIDE}
    devices = sorted({one.owner for one in answering if one.name == f"fedbus-{CLIENT_MANAGER_NAME}"})
    return [
        _check_server_agents(server),
        _check_clients(devices),
        _check_dashboard(answers=GATEWAY_NAME in server),
    ]


def _check_server_agents(there: set[str]) -> DoctorFinding:
    missing = [name for name in SERVER_AGENT_NAMES if name not in there]
    if not missing:
        return DoctorFinding("server's agents", Severity.OK, f"all answer: {', '.join(SERVER_AGENT_NAMES)}")
    if len(missing) == len(SERVER_AGENT_NAMES):
        return DoctorFinding(
            "server's agents", Severity.WARNING, "none answers", "start them: fedbus server up"
        )
    advice = "see the log of the process that it runs in, or start it: fedbus agent NAME"
    return DoctorFinding("server's agents", Severity.ERROR, f"no answer from {', '.join(missing)}", advice)


def _check_clients(there: list[str]) -> DoctorFinding:
    if there:
        return DoctorFinding("devices", Severity.OK, f"{len(there)} answer")
    return DoctorFinding("devices", Severity.WARNING, "none answers", "start one: fedbus client up ID")


def _check_dashboard(*, answers: bool) -> DoctorFinding:
    if answers:
        return DoctorFinding("dashboard", Severity.OK, "it answers")
    return DoctorFinding(
        "dashboard", Severity.WARNING, "none runs", "fedbus gateway starts one, where one is wanted"
    )
