"""The folder with the results of one simulation.

    config.json                     the settings and the state of the simulation
    rounds.jsonl                    the result of each round, one JSON object a line
    checkpoints/round-3.safetensors the global model after a round, for `--resume`; the newest two are kept
    model.safetensors               the final model
    training.db, tensorboard/, …    the files of the experiment trackers

A round is complete when its line is in rounds.jsonl, which is written after the checkpoint. So a simulation that was
killed continues after its last complete round. Files are replaced atomically; a part of a last line is ignored.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self, TextIO

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from fedbus.app.failures import CliError, ExitCode
from fedbus.common.filesystem import SHARED_MODE, atomic_write
from fedbus.contracts.run import RoundResult, Scalar
from fedbus.learning import weights
from fedbus.learning.weights import Arrays, BadWeights

CONFIG_FILE: Final = "config.json"
ROUNDS_FILE: Final = "rounds.jsonl"
MODEL_FILE: Final = "model.safetensors"
CHECKPOINTS: Final = "checkpoints"
KEPT_CHECKPOINTS: Final = 2

State = Literal["running", "cancelled", "failed", "finished"]
"""The states of a run; ``cancelled`` is a simulation that was interrupted."""


class SimulationConfig(BaseModel):
    """What determines the results of a simulation."""

    model_config = ConfigDict(frozen=True)

    task: str
    code_version: str
    clients: int
    cohort: int | None = None
    rounds: int
    seed: int | None = None
    deterministic: bool = False
    partition: str | None = None
    profile: str = ""
    """The SHA-256 digest of the profile; empty without one."""
    overrides: dict[str, Scalar] = Field(default_factory=dict)
    aggregation: dict[str, Scalar] = Field(default_factory=dict)
    data_dir: str = ""
    start_model: str = ""
    """The SHA-256 digest of the model that the simulation started from; empty: the task's own first model."""
    start_version: int | None = None
    """Its version in the model repository."""

    def differences(self, other: "SimulationConfig") -> list[str]:
        """Describe what differs in *other*: ``seed: 1, now 2``. More rounds are no difference."""
        own, theirs = self.model_dump(), other.model_dump()
        return [
            f"{name.replace('_', ' ')}: {_describe(own[name])}, now {_describe(theirs[name])}"
            for name in own
            if own[name] != theirs[name] and name not in ("rounds", "start_model", "start_version")
        ]


class SimulationRecord(BaseModel):
    """The content of `CONFIG_FILE`."""

    simulation: str
    """The name of the simulation."""
    state: State = "running"
    reason: str = ""
    """Why it failed."""
    config: SimulationConfig
    profile: str | None = None
    """The profile as it was named, for a simulation that is resumed."""
    trackers: tuple[str, ...] = ()
    fedbus: str
    """The version of fedbus."""
    started: AwareDatetime
    ended: AwareDatetime | None = None
    seconds: float = 0.0
    """The duration of all its parts together, if it was resumed."""
    simulated_s: float = 0.0
    """The duration on the clock of the run, which a profile makes virtual."""
    peak_memory_bytes: int = 0
    model_sha256: str = ""
    trace_parent: str = ""
    """The root of its trace, as a W3C traceparent."""


class ResultsFolder:
    """The results in *path*."""

    def __init__(self, path: Path, record: SimulationRecord) -> None:
        self.path = path
        self.record = record
        self._locked: TextIO | None = None
        """The file with the lock of the running simulation."""

    @classmethod
    def create(cls, path: Path, record: SimulationRecord) -> Self:
        """Create the folder. Raises CliError if it has the results of a simulation, or cannot be written."""
        if (path / CONFIG_FILE).exists():
            raise CliError(
                f"{path} has the results of a simulation. Continue it with --resume, or choose another --out",
                ExitCode.USAGE,
            )
        folder = cls(path, record)
        try:
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            folder._write_record()
        except OSError as error:
            raise CliError(f"cannot write {path}: {error.strerror or error}", ExitCode.MACHINE) from None
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the results of an earlier simulation. Raises CliError if there are none."""
        try:
            record = SimulationRecord.model_validate_json((path / CONFIG_FILE).read_text())
        except FileNotFoundError:
            raise CliError(
                f"there is no simulation in {path} to resume. Name its folder with --out", ExitCode.NOT_FOUND
            ) from None
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
            raise CliError(f"cannot read {path / CONFIG_FILE}: {reason}") from None
        return cls(path, record)

    # --- writing ------------------------------------------------------------------------------

    def add_round(self, result: RoundResult, model: Arrays) -> None:
        """Write the checkpoint of a round, then its line."""
        checkpoints = self.path / CHECKPOINTS
        if model:
            weights.save(model, _checkpoint(self.path, result.round))
            for old in sorted(_rounds_with_checkpoint(self.path))[:-KEPT_CHECKPOINTS]:
                _checkpoint(self.path, old).unlink(missing_ok=True)
        checkpoints.mkdir(exist_ok=True)
        with (self.path / ROUNDS_FILE).open("a") as file:
            file.write(f"{result.model_dump_json()}\n")

    def begin(self, config: SimulationConfig, *, trace_parent: str) -> None:
        """Record that the simulation starts or continues. Raises CliError if it is running already."""
        self._lock()
        self._drop_partial_line()
        self._update(state="running", reason="", ended=None, config=config, trace_parent=trace_parent)

    def end(
        self,
        state: str,
        *,
        model: Arrays | None = None,
        seconds: float,
        simulated_s: float = 0.0,
        peak_memory_bytes: int = 0,
        reason: str = "",
    ) -> None:
        """Write the final model, record how the simulation ended, and release the folder."""
        digest = weights.save(model, self.model_path).sha256 if model else self.record.model_sha256
        self._update(
            model_sha256=digest,
            state=state,
            reason=reason,
            ended=datetime.now(UTC),
            seconds=self.record.seconds + seconds,
            simulated_s=self.record.simulated_s + simulated_s,
            peak_memory_bytes=max(self.record.peak_memory_bytes, peak_memory_bytes),
        )
        if self._locked is not None:
            self._locked.close()

    def _lock(self) -> None:
        """Lock the folder until the end of the simulation, or of this process."""
        file = (self.path / ROUNDS_FILE).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CliError(
                f"the simulation in {self.path} is already running. Wait for its end, or interrupt it"
            ) from None
        self._locked = file

    def _update(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        self._write_record()

    def _write_record(self) -> None:
        atomic_write(self.path / CONFIG_FILE, self.record.model_dump_json(indent=2) + "\n", mode=SHARED_MODE)

    def _drop_partial_line(self) -> None:
        """Remove what follows the last complete line, so that the next line starts at its beginning."""
        path = self.path / ROUNDS_FILE
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            os.truncate(path, len(complete))

    # --- reading ------------------------------------------------------------------------------

    @property
    def model_path(self) -> Path:
        return self.path / MODEL_FILE

    def read_rounds(self) -> list[RoundResult]:
        """Return the complete rounds, in order. Of a round that was repeated, the last result counts."""
        rounds: dict[int, RoundResult] = {}
        path = self.path / ROUNDS_FILE
        for line in path.read_text().split("\n")[:-1] if path.exists() else ():
            try:
                result = RoundResult.model_validate_json(line)
            except ValidationError as error:
                raise CliError(f"{path} is damaged: {error.errors()[0]['msg']}") from None
            rounds[result.round] = result
        return [rounds[number] for number in sorted(rounds)]

    def read_checkpoint(self) -> tuple[int, Arrays]:
        """Return the last complete round and the model after it; round 0 and no model if there is none.

        Raises CliError if the checkpoint is missing or damaged.
        """
        done = max((result.round for result in self.read_rounds()), default=0)
        if done == 0:
            return 0, {}
        path = _checkpoint(self.path, done)
        try:
            return done, weights.load(path)
        except (OSError, BadWeights) as error:
            raise CliError(
                f"the simulation cannot continue after round {done}: {path} cannot be read ({error}). "
                "Start a new one without --resume"
            ) from None


def new_results_path(home: Path, task: str) -> Path:
    """Return the folder of the next simulation of *task*: ``simulations/mnist-sim-3``."""
    numbers = [_number_of(path, task) for path in _simulations(home).glob(f"{task}-sim-*")]
    return _simulations(home) / f"{task}-sim-{max(numbers, default=0) + 1}"


def latest_results_path(home: Path, task: str) -> Path | None:
    """Return the folder of the newest simulation of *task*; None if there is none."""
    found = [path for path in _simulations(home).glob(f"{task}-sim-*") if (path / CONFIG_FILE).exists()]
    return max(found, key=lambda path: _number_of(path, task), default=None)


def to_json_values(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


def _simulations(home: Path) -> Path:
    return home / "simulations"


def _number_of(path: Path, task: str) -> int:
    text = path.name.removeprefix(f"{task}-sim-")
    return int(text) if text.isdecimal() else 0


def _checkpoint(path: Path, round_number: int) -> Path:
    return path / CHECKPOINTS / f"round-{round_number}.safetensors"


def _rounds_with_checkpoint(path: Path) -> list[int]:
    names = [one.stem.removeprefix("round-") for one in (path / CHECKPOINTS).glob("round-*.safetensors")]
    return [int(name) for name in names if name.isdecimal()]


def _describe(value: object) -> str:
    if value in (None, "", {}):
        return "none"
    return to_json_values(value) if isinstance(value, Mapping) else str(value)
