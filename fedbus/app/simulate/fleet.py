"""`fedbus simulate --fleet`: the agents of a whole federation under virtual time, without training.

The folder of the results has the transition log, one JSON object a line, and `summary.json`.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from fedbus.app.failures import CliError, ExitCode, report_write_errors
from fedbus.app.settings import Settings
from fedbus.app.simulate.interruption import interruptible
from fedbus.app.simulate.options import load_task
from fedbus.app.telemetry import log_to_stderr
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.simulation_progress import BAR_WIDTH, MAX_REASON_CHARS, show_line
from fedbus.app.terminal.top_screen import render_bar
from fedbus.app.terminal.trace_waterfall import format_duration
from fedbus.common.filesystem import SHARED_MODE, atomic_write
from fedbus.contracts.run import RunState
from fedbus.contracts.task.task import Task
from fedbus.simulation.fleet.fleet import simulate_fleet
from fedbus.simulation.fleet.settings import FleetProgress, FleetResult, FleetSettings
from fedbus.simulation.profiles.reader import load_profile

TRANSITIONS_FILE: Final = "transitions.jsonl"
SUMMARY_FILE: Final = "summary.json"
DEFAULT_FLEET: Final = 1000
HOUR_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """The options of `fedbus simulate --fleet`. None: not given."""

    task: str
    clients: int | None = None
    cohort: int | None = None
    rounds: int | None = None
    seed: int | None = None
    profile: str | None = None
    duration_s: float | None = None
    every_s: float | None = None
    train_s: float | None = None
    out: Path | None = None
    json: bool = False


class FleetView:
    """The progress of a simulated fleet as a line with a bar."""

    def __init__(self, name: str, duration_s: float) -> None:
        self._name = name
        self._duration_s = duration_s
        self._started = time.monotonic()
        self._progress: FleetProgress | None = None

    def update(self, progress: FleetProgress) -> None:
        self._progress = progress

    def render(self) -> Text:
        """Render the line."""
        done = self._progress
        if done is None:
            return Text(f"{self._name} starts the devices")
        elapsed = max(1e-9, time.monotonic() - self._started)
        speed = done.simulated_s / elapsed
        left_s = (self._duration_s - done.simulated_s) / speed if speed > 0 else 0.0
        parts = [
            f"{format_duration(done.simulated_s)} of {format_duration(self._duration_s)}",
            f"{speed:.0f} times real time",
            f"ETA {format_duration(max(1.0, left_s))}",
            done.run,
            f"{done.messages:,} messages",
        ]
        bar = render_bar(int(done.simulated_s), max(1, int(self._duration_s)), BAR_WIDTH)
        line = Text.assemble((self._name, "bold"), " ", bar, " ", "  ".join(filter(None, parts)))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line


def run_fleet(options: FleetOptions) -> None:
    """Simulate a fleet, and print its runs.

    Raises:
        CliError: the options are invalid, or the simulation was interrupted.
        BadSettings: the numbers of clients do not fit.
        ProfileError: the profile is invalid.

    """
    log_to_stderr(level="ERROR", log_format="console")
    settings, console = Settings.from_environment(), output.console()
    task = load_task(options.task, settings)
    fleet = _make_settings(options, task)
    path = options.out or _new_path(settings.home, task.id)
    if (path / SUMMARY_FILE).exists():
        raise CliError(f"{path} has the results of a simulation. Choose another --out", ExitCode.USAGE)
    with report_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    view = FleetView(path.resolve().name, fleet.duration_s)
    shown = show_line(view.render, console, wanted=not options.json)
    if not options.json:
        _print_head(path, fleet, options.profile, console)
    try:
        with (
            report_write_errors(path),
            (path / TRANSITIONS_FILE).open("w") as log,
            interruptible() as interruption,
            shown,
        ):
            result = simulate_fleet(fleet, log=log, observer=view.update)
    except KeyboardInterrupt:
        raise CliError(
            f"the simulation was interrupted. Its transitions so far are in {path / TRANSITIONS_FILE}",
            interruption.exit_code,
        ) from None
    facts = _facts(result, path)
    atomic_write(path / SUMMARY_FILE, json.dumps(facts, indent=2) + "\n", mode=SHARED_MODE)
    if options.json:
        print_json(facts)
    else:
        _print_result(result, path, console)


def _make_settings(options: FleetOptions, task: Task) -> FleetSettings:
    given = {
        "cohort": options.cohort,
        "rounds": options.rounds,
        "every_s": options.every_s,
        "train_s": options.train_s,
    }
    return FleetSettings(
        task=task,
        clients=options.clients or DEFAULT_FLEET,
        seed=options.seed or 0,
        duration_s=options.duration_s or HOUR_S,
        profile=None if options.profile is None else load_profile(options.profile),
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def _new_path(home: Path, task: str) -> Path:
    folder = home / "simulations"
    numbers = [
        int(number)
        for path in folder.glob(f"{task}-fleet-*")
        if (number := path.name.rpartition("-")[2]).isdecimal()
    ]
    return folder / f"{task}-fleet-{max(numbers, default=0) + 1}"


def _facts(result: FleetResult, path: Path) -> dict[str, Any]:
    return {
        "simulation": path.resolve().name,
        "clients": result.clients,
        "simulated_s": result.simulated_s,
        "seconds": result.seconds,
        "runs": [asdict(run) for run in result.runs],
        "participation": result.participation,
        "messages": result.messages,
        "restarts": result.restarts,
        "transitions": {
            f"{kind} {state}": count for (kind, state), count in sorted(result.transitions.items())
        },
        "peak_memory_bytes": result.peak_memory_bytes,
        "log_sha256": result.log_sha256,
        "results": str(path.absolute()),
    }


def _shorten(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON_CHARS else reason[: MAX_REASON_CHARS - 1] + "…"


def _print_head(path: Path, fleet: FleetSettings, profile: str | None, console: Console) -> None:
    parts = [
        f"{fleet.clients:,} clients",
        f"cohort {fleet.cohort}" if fleet.cohort else "",
        f"{format_duration(fleet.duration_s)} of virtual time",
        f"profile {profile}" if profile else "",
        f"seed {fleet.seed}",
    ]
    console.print(Text(f"{path.resolve().name}: {', '.join(filter(None, parts))}"), soft_wrap=True)


def _print_result(result: FleetResult, path: Path, console: Console) -> None:
    output.print_table(
        ("run", "state", "start", "duration", "rounds", "joined", "trained", "failed"),
        [
            (
                run.run,
                output.state_text(run.state),
                format_duration(run.requested_at_s),
                "" if run.ended_at_s is None else format_duration(run.ended_at_s - run.requested_at_s),
                run.rounds,
                run.joined,
                run.trainings - run.failures,
                run.failures,
            )
            for run in result.runs
        ],
        empty="no run started",
    )
    for run in result.runs:
        if run.state == RunState.FAILED and run.reason:
            reason = Text(f"{run.run} failed: {_shorten(run.reason)}", "red")
            console.print(reason, soft_wrap=True, highlight=False)
    speed = result.simulated_s / result.seconds if result.seconds else 0.0
    rows = [
        (
            "simulated",
            f"{format_duration(result.simulated_s)} in {format_duration(result.seconds)}, {speed:.0f} times real time",
        ),
        ("messages", f"{result.messages:,}, {result.messages_per_second:,.0f} a second"),
        ("peak memory", output.format_size(result.peak_memory_bytes)),
        ("trained", f"{result.participation:.1%} of the trainings succeeded"),
        ("results", str(path)),
        ("log sha256", f"{result.log_sha256[:16]}…, equal for the same settings and seed"),
    ]
    console.print()
    for name, text in rows:
        console.print(Text.assemble((f"  {name:<12} ", "dim"), text), soft_wrap=True, highlight=False)
