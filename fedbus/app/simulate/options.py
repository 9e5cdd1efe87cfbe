"""The options of `fedbus simulate`, and the settings of the simulation that they make."""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedbus import __version__
from fedbus.app.composition.initial_code import code_from_settings, load_initial_task
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.simulate.results_folder import ResultsFolder, SimulationConfig
from fedbus.contracts.model import Manifest, SimulationOrigin
from fedbus.contracts.run import Scalar
from fedbus.contracts.task.run_config import InvalidOverride, parse_override_of
from fedbus.contracts.task.task import Task
from fedbus.learning.data import InvalidPartitioning, Partitioning
from fedbus.learning.data.client_data import PARTITION
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.weights import Arrays
from fedbus.simulation.profiles.reader import load_profile
from fedbus.simulation.settings import BadSettings, EngineName, SimulationSettings
from fedbus.simulation.simulator import check_library
from fedbus.stores.tasks.task_directory import read_task

DEFAULT_CLIENTS: Final = 10
DEFAULT_SEED: Final = 0
VISIBLE_GPUS: Final = "CUDA_VISIBLE_DEVICES"
WORKERS_LOG: Final = "workers.log"
_PARTITION_USE: Final = re.compile(rf"""\bclient_data\b|["']{PARTITION}["']|\bPARTITION\b""")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """The options of one call of `fedbus simulate`. None and empty: not given."""

    task: str
    clients: int | None = None
    cohort: int | None = None
    rounds: int | None = None
    seed: int | None = None
    deterministic: bool | None = None
    partition: str | None = None
    profile: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    """New values of keys of the run configuration, as text."""
    aggregation: Mapping[str, Scalar] = field(default_factory=dict)
    """Overrides of the keys of ``[tool.fedbus.aggregation]``."""
    data_dir: Path | None = None
    workers: int | None = None
    gpus: int = 0
    engine: EngineName = "local"
    ray_address: str | None = None
    trackers: tuple[str, ...] = ()
    out: Path | None = None
    resume: bool = False
    start_version: str = ""
    """The version of the model repository to start from."""
    publish: bool = False
    store: str = ""
    json: bool = False


@dataclass(frozen=True)
class StartModel:
    """The version of the model repository that a simulation starts from."""

    manifest: Manifest
    arrays: Arrays


def load_task(source: str, settings: Settings) -> Task:
    """Load the task in a directory, or the newest commit of an address. Raises StoreError, CliError."""
    if "://" in source:
        return load_initial_task(code_from_settings(settings, source), settings)
    path = Path(source)
    if not path.is_dir():
        raise CliError(
            f"{source} is not a directory. Name the directory with the task's pyproject.toml, or "
            "git+https://host/repo@branch#subdirectory=dir",
            ExitCode.NOT_FOUND,
        )
    return read_task(path.absolute(), open_library)


def make_config(
    options: SimulateOptions, task: Task, settings: Settings, start: StartModel | None
) -> SimulationConfig:
    """Combine the options with the task and the defaults. Raises CliError, ProfileError."""
    rounds = options.rounds or task.plan_run().total_rounds
    data_dir = find_data_dir(options, settings)
    return SimulationConfig(
        task=task.id,
        code_version=task.code_version,
        clients=DEFAULT_CLIENTS if options.clients is None else options.clients,
        cohort=options.cohort,
        rounds=rounds,
        seed=DEFAULT_SEED if options.seed is None else options.seed,
        deterministic=bool(options.deterministic),
        partition=_normalize_partition(options.partition),
        profile=_digest_of_profile(options.profile),
        overrides=_parse_overrides(options.overrides, task),
        aggregation=dict(options.aggregation),
        data_dir=str(data_dir or ""),
        start_model=start.manifest.sha256 if start else "",
        start_version=start.manifest.version if start else None,
    )


def resume_config(
    options: SimulateOptions, task: Task, settings: Settings, folder: ResultsFolder
) -> SimulationConfig:
    """Return the stored configuration, with more rounds if the options ask for them.

    Options that are not given are those of the simulation.

    Raises:
        CliError: an option, the code or the profile differs. The text names each difference.

    """
    stored = folder.record.config
    now = make_config(options, task, settings, None)
    given: dict[str, Any] = {"task": now.task, "code_version": now.code_version, "profile": now.profile}
    for name in ("clients", "cohort", "seed", "deterministic", "partition"):
        if getattr(options, name) is not None:
            given[name] = getattr(now, name)
    if options.overrides:
        given["overrides"] = now.overrides
    if options.aggregation:
        given["aggregation"] = now.aggregation
    if options.data_dir is not None:
        given["data_dir"] = now.data_dir
    differences = stored.differences(stored.model_copy(update=given))
    if differences:
        raise CliError(
            f"the simulation in {folder.path} cannot continue with other settings: {'; '.join(differences)}. "
            "Leave these options out, or start a new simulation without --resume",
            ExitCode.USAGE,
        )
    if options.start_version:
        raise CliError(
            "--from is not possible with --resume: the model is the last checkpoint", ExitCode.USAGE
        )
    done = max((result.round for result in folder.read_rounds()), default=0)
    if options.rounds is not None and options.rounds < done:
        raise CliError(
            f"the simulation in {folder.path} has {done} rounds, more than --rounds {options.rounds}",
            ExitCode.USAGE,
        )
    return stored.model_copy(update={"rounds": options.rounds or stored.rounds})


def make_settings(
    options: SimulateOptions,
    config: SimulationConfig,
    task: Task,
    *,
    run: str,
    folder: Path,
    first_round: int,
    model: Arrays | None,
) -> SimulationSettings:
    """Make the settings of the simulation. Raises CliError."""
    try:
        check_library(task.table.library)
        return SimulationSettings(
            task=task,
            clients=config.clients,
            cohort=config.cohort,
            rounds=config.rounds or None,
            seed=config.seed,
            deterministic=config.deterministic,
            workers=options.workers,
            config=config.overrides,
            aggregation=config.aggregation,
            partition=config.partition,
            data_dir=Path(config.data_dir) if config.data_dir else None,
            model=model,
            first_round=first_round,
            run=run,
            profile=options.profile,
            gpus=find_gpus(options.gpus),
            engine=options.engine,
            ray_address=options.ray_address,
            log_file=folder / WORKERS_LOG,
        )
    except BadSettings as error:
        raise CliError(str(error), ExitCode.USAGE) from None


def make_origin(config: SimulationConfig, engine: str) -> SimulationOrigin:
    """Return what the manifest of a published model states."""
    return SimulationOrigin(
        clients=config.clients,
        cohort=config.cohort,
        seed=config.seed,
        deterministic=config.deterministic,
        partition=config.partition or "",
        profile=config.profile,
        aggregation=config.aggregation,
        engine=engine,
        fedbus=__version__,
    )


def find_data_dir(options: SimulateOptions, settings: Settings) -> Path | None:
    """Return the folder of the data sets; None if none is configured and the default does not exist.

    Raises:
        CliError: the configured folder does not exist, or a partition needs one.

    """
    configured = options.data_dir or settings.configured_data_dir
    folder = (options.data_dir or settings.data_dir).expanduser().absolute()
    if folder.is_dir():
        return folder
    if configured is not None or options.partition is not None:
        source = "--data" if options.data_dir else "FEDBUS_DATA_DIR" if configured else "the default"
        raise CliError(
            f"the data folder {folder} ({source}) does not exist. Set FEDBUS_DATA_DIR or --data to the folder with "
            "the data sets",
            ExitCode.NOT_FOUND,
        )
    return None


def warn_of_partition(config: SimulationConfig, task: Task) -> str:
    """Return a warning if the code of *task* seems to ignore the partition; empty otherwise.

    An app gets the partition in its node configuration. It may use another package that reads it, so this is no error.
    """
    if config.partition is None or uses_partition(Path(task.path)):
        return ""
    return (
        f"--partition {config.partition} seems to have no effect: no Python file of the task calls client_data of "
        "fedbus.learning.data or reads the key `partition` of the node configuration"
    )


def uses_partition(directory: Path) -> bool:
    """Return whether a Python file in *directory* has the name of the function or the key that yields a partition."""
    for file in directory.rglob("*.py"):
        if any(part.startswith(".") for part in file.relative_to(directory).parts):
            continue
        if _PARTITION_USE.search(file.read_text(errors="replace")):
            return True
    return False


def find_gpus(count: int) -> tuple[str, ...]:
    """Return the names of the first *count* GPUs that this process may use, without CUDA. Raises CliError."""
    if count == 0:
        return ()
    found = _list_gpus()
    if len(found) < count:
        present = f"this machine has {len(found)}" if found else "this machine has none"
        hidden = f" ({VISIBLE_GPUS}={os.environ[VISIBLE_GPUS]})" if VISIBLE_GPUS in os.environ else ""
        raise CliError(
            f"--gpus {count}: {present}{hidden}. Leave the option out to train on the CPU", ExitCode.MACHINE
        )
    return tuple(found[:count])


def _list_gpus() -> list[str]:
    """List the visible GPUs as nvidia-smi does: CUDA must not be initialised in the process that forks workers."""
    if VISIBLE_GPUS in os.environ:
        return [one for one in os.environ[VISIBLE_GPUS].replace(" ", "").split(",") if one not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        str(number)
        for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))
    ]


def _parse_overrides(overrides: Mapping[str, str], task: Task) -> dict[str, Scalar]:
    try:
        return {key: parse_override_of(task.run_config, key, text) for key, text in overrides.items()}
    except InvalidOverride as error:
        key = next((one for one in overrides if one.partition(".")[0] == "aggregation"), "")
        hint = ". For keys of [tool.fedbus.aggregation], use --aggregation" if key else ""
        raise CliError(f"--set: {error}{hint}", ExitCode.USAGE) from None


def _normalize_partition(text: str | None) -> str | None:
    try:
        return None if text is None else str(Partitioning.parse(text))
    except InvalidPartitioning as error:
        raise CliError(f"--partition: {error}", ExitCode.USAGE) from None


def _digest_of_profile(profile: str | None) -> str:
    """Return the digest of the profile with the values of its parameters; empty without one."""
    return (
        ""
        if profile is None
        else hashlib.sha256(load_profile(profile).model_dump_json().encode()).hexdigest()
    )
