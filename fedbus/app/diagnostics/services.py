"""What a fedbus leans on beyond its machine and its bus: the model repository, the code, who else is at work.

Findings for `fedbus doctor`, each in plain words with what to do.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from fedbus.app.finding import Finding, Health
from fedbus.app.settings import Settings
from fedbus.bus.bus import Answering
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.stores.code.address import is_address
from fedbus.stores.code.interface import BadCodeSource, GitMissing
from fedbus.stores.code.open import open_code
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import tasks_in

PATIENCE_S: Final = 3.0
"""How long a repository that is afar is asked."""
CODE_S: Final = 15.0
OF_THE_SERVER: Final = (
    AgentName.REGISTRAR,
    AgentName.SERVER_MANAGER,
    AgentName.WORKFLOW_SCHEDULER,
    AgentName.FLOWER_SERVER,
    AgentName.TRAINING_MONITOR,
)
GATEWAY: Final = AgentName.GATEWAY
OF_A_DEVICE: Final = AgentName.CLIENT_MANAGER


async def repositories(settings: Settings) -> list[Finding]:
    """The model repository and the code, where they are named: what is only a folder of our own is here anyway."""
    store = [await _store(settings)] if settings.given_store and not settings.client else []
    return store + ([await _code(settings)] if is_address(settings.task) else [])


async def _store(settings: Settings) -> Finding:
    url = settings.store_url
    try:
        tasks = await tasks_in(url, patience_s=PATIENCE_S)
    except (StoreError, OSError) as error:
        return Finding(
            "models", Health.ILL, str(error), "see FEDBUS_STORE; no run can keep a model until then"
        )
    held = f"models of {', '.join(tasks)}" if tasks else "no models yet"
    return Finding("models", Health.WELL, f"{url}: {held}")


async def _code(settings: Settings) -> Finding:
    try:
        code = open_code(
            settings.task,
            settings.home,
            signers=settings.allowed_signers,
            allow_install=settings.allowed_installs,
        )
        async with asyncio.timeout(CODE_S):
            newest = await code.newest()
    except TimeoutError:
        advice = "see whether this machine reaches it, and FEDBUS_TASK"
        return Finding("code", Health.ILL, f"{settings.task}: no answer within {CODE_S:g} s", advice)
    except (StoreError, BadCodeSource, GitMissing) as error:
        return Finding("code", Health.ILL, str(error), "see FEDBUS_TASK; no new commit comes here until then")
    found = f"{settings.task}, newest commit {newest[:12]}"
    if settings.allowed_signers is None:
        advice = "name who may sign commits in FEDBUS_ALLOWED_SIGNERS: until then anybody's are run"
        return Finding("code", Health.REMARK, f"{found}, not verified", advice)
    return Finding("code", Health.WELL, f"{found}, signed by those in {settings.allowed_signers}")


def judge_agents(answering: Sequence[Answering]) -> list[Finding]:
    """Who is at work in the federation, and who should be and is not."""
    server = {one.name.removeprefix("fedbus-") for one in answering if one.owner == SERVER_SIDE}
    devices = sorted({one.owner for one in answering if one.name == f"fedbus-{OF_A_DEVICE}"})
    return [_server_side(server), _devices(devices), _dashboard(answers=GATEWAY in server)]


def _server_side(there: set[str]) -> Finding:
    missing = [name for name in OF_THE_SERVER if name not in there]
    if not missing:
        return Finding("server's agents", Health.WELL, f"all answer: {', '.join(OF_THE_SERVER)}")
    if len(missing) == len(OF_THE_SERVER):
        return Finding("server's agents", Health.REMARK, "none answers", "start them: fedbus server up")
    advice = "see the log of the process that it runs in, or start it: fedbus agent NAME"
    return Finding("server's agents", Health.ILL, f"no answer from {', '.join(missing)}", advice)


def _devices(there: list[str]) -> Finding:
    if there:
        return Finding("devices", Health.WELL, f"{len(there)} answer")
    return Finding("devices", Health.REMARK, "none answers", "start one: fedbus client up ID")


def _dashboard(*, answers: bool) -> Finding:
    if answers:
        return Finding("dashboard", Health.WELL, "it answers")
    return Finding("dashboard", Health.REMARK, "none runs", "fedbus gateway starts one, where one is wanted")
