"""The preparation of `fedbus simulate`: everything that can fail before the first round."""

import asyncio
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedbus import __version__
from fedbus.app.cli.commands.model.repository import find_manifest, open_models, store_address
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.simulate.options import (
    SimulateOptions,
    StartModel,
    load_task,
    make_config,
    make_settings,
    resume_config,
)
from fedbus.app.simulate.results_folder import (
    ResultsFolder,
    SimulationConfig,
    SimulationRecord,
    latest_results_path,
    new_results_path,
)
from fedbus.contracts.identifiers import check_id
from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.weights import Arrays
from fedbus.stores.trackers.interface import load_tracker

MAX_NAME_CHARS: Final = 63
"""The longest id."""
BUILT_IN: Final = "local"
"""The tracker that always records."""


@dataclass
class PreparedSimulation:
    """A simulation that can start."""

    options: SimulateOptions
    settings: Settings
    task: Task
    folder: ResultsFolder
    config: SimulationConfig
    first_round: int
    model: Arrays | None
    start: StartModel | None

    @property
    def name(self) -> str:
        return self.folder.record.simulation

    @property
    def is_complete(self) -> bool:
        """Whether all rounds are done, in an earlier part of a resumed simulation."""
        return bool(self.config.rounds) and self.first_round > self.config.rounds


def prepare(options: SimulateOptions, settings: Settings) -> PreparedSimulation:
    """Load task, start model and checkpoint, and create or open the results folder. Raises CliError, StoreError."""
    task = load_task(options.task, settings)
    if options.resume:
        path = options.out or latest_results_path(settings.home, task.id)
        if path is None:
            raise CliError(
                f"there is no simulation of {task.id} in {settings.home / 'simulations'} to resume",
                ExitCode.NOT_FOUND,
            )
        folder = ResultsFolder.open(path)
        options = replace(
            options,
            profile=options.profile or folder.record.profile,
            trackers=options.trackers or folder.record.trackers,
        )
        config = resume_config(options, task, settings, folder)
        done, model = folder.read_checkpoint()
        start = _load_start(options, task, str(config.start_version or ""))
        first = model or (start.arrays if start else None)
        return PreparedSimulation(options, settings, task, folder, config, done + 1, first, start)
    start = _load_start(options, task, options.start_version)
    config = make_config(options, task, settings, start)
    path = options.out or new_results_path(settings.home, task.id)
    record = SimulationRecord(
        simulation=_name_after(path),
        config=config,
        profile=_absolute(options.profile),
        trackers=tuple(tracker_names(options, settings)),
        fedbus=__version__,
        started=datetime.now(UTC),
    )
    arrays = start.arrays if start else None
    for name in tracker_names(options, settings):
        load_tracker(name)
    make_settings(options, config, task, run=record.simulation, folder=path, first_round=1, model=arrays)
    folder = ResultsFolder.create(path, record)
    return PreparedSimulation(options, settings, task, folder, config, 1, arrays, start)


def _load_start(options: SimulateOptions, task: Task, version: str) -> StartModel | None:
    """Load the version of the model repository to start from, if there is one."""
    if not version:
        return None

    async def load() -> StartModel:
        models = open_models(store_address(options.store), task.id)
        manifest = await find_manifest(models, version)
        return StartModel(manifest, weights.load(await models.local_path(manifest.sha256)))

    return asyncio.run(load())


def _name_after(path: Path) -> str:
    """Return the name of a simulation whose results are in *path*: that of the folder, as an id. Raises CliError."""
    name = re.sub("[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-")[:MAX_NAME_CHARS].rstrip("-")
    if not name:
        raise CliError(
            f"--out {path}: the simulation gets the name of the folder, which has no letter from a to z and no digit. "
            "Choose another folder",
            ExitCode.USAGE,
        )
    return check_id("simulation", name)


def _absolute(profile: str | None) -> str | None:
    """Return *profile* as an absolute path if it is a file, so that a resumed simulation finds it."""
    return str(Path(profile).absolute()) if profile is not None and Path(profile).is_file() else profile


def tracker_names(options: SimulateOptions, settings: Settings) -> list[str]:
    """Return the trackers of the options; those of the settings if there are none. The built-in one is not named."""
    return [name for name in dict.fromkeys(options.trackers or settings.tracker_names) if name != BUILT_IN]


def check_publishing(prepared: PreparedSimulation) -> None:
    """Check before the first round that the repository can be used, and the signing key be read."""
    if prepared.options.publish:
        prepared.settings.load_signer()
        models = open_models(store_address(prepared.options.store), prepared.task.id)
        asyncio.run(models.prepare())
