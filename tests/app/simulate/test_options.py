"""The options of a simulation: defaults, what a resumed one may change, and the errors of bad ones."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.federation import TINY_TASK

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import Settings
from fedbus.app.simulate.options import (
    SimulateOptions,
    find_data_dir,
    find_gpus,
    load_task,
    make_config,
    make_settings,
    resume_config,
    warn_of_partition,
)
from fedbus.app.simulate.results_folder import ResultsFolder, SimulationRecord
from fedbus.contracts.run import RoundResult
from fedbus.contracts.task.task import Task

OPTIONS = SimulateOptions(task=str(TINY_TASK))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def task(settings: Settings) -> Task:
    return load_task(str(TINY_TASK), settings)


def resumable(
    path: Path, task: Task, settings: Settings, options: SimulateOptions = OPTIONS
) -> ResultsFolder:
    config = make_config(options, task, settings, None)
    record = SimulationRecord(simulation="sim", config=config, fedbus="1", started=datetime.now(UTC))
    folder = ResultsFolder.create(path / "sim", record)
    folder.add_round(RoundResult(round=1), {})
    return folder


def test_the_task_has_the_default_number_of_rounds(task: Task, settings: Settings) -> None:
    config = make_config(OPTIONS, task, settings, None)

    assert (config.clients, config.rounds, config.seed, config.deterministic) == (10, 2, 0, False)


def test_a_resumed_simulation_keeps_options_that_are_left_out(
    tmp_path: Path, task: Task, settings: Settings
) -> None:
    folder = resumable(
        tmp_path, task, settings, replace(OPTIONS, clients=50, seed=4, overrides={"slow": "1"})
    )

    assert resume_config(OPTIONS, task, settings, folder) == folder.record.config


def test_a_resumed_simulation_may_have_more_rounds(tmp_path: Path, task: Task, settings: Settings) -> None:
    folder = resumable(tmp_path, task, settings)

    assert resume_config(replace(OPTIONS, rounds=9), task, settings, folder).rounds == 9


def test_the_difference_of_a_resumed_simulation_is_named(
    tmp_path: Path, task: Task, settings: Settings
) -> None:
    folder = resumable(tmp_path, task, settings)
    changed = task.model_copy(update={"code_version": "other"})

    with pytest.raises(CliError, match=r"code version: .*, now other; clients: 10, now 3\. Leave") as error:
        resume_config(replace(OPTIONS, clients=3), changed, settings, folder)
    assert error.value.code == ExitCode.USAGE


def test_a_cohort_larger_than_the_clients_is_refused(tmp_path: Path, task: Task, settings: Settings) -> None:
    options = replace(OPTIONS, clients=3, cohort=4)
    config = make_config(options, task, settings, None)

    with pytest.raises(CliError, match=r"cohort has 4 clients \(limit 3"):
        make_settings(options, config, task, run="sim", folder=tmp_path, first_round=1, model=None)


def test_a_superlink_task_is_refused(tmp_path: Path, task: Task, settings: Settings) -> None:
    table = task.table.model_copy(update={"library": "flower-superlink"})
    superlink = task.model_copy(update={"table": table})
    config = make_config(OPTIONS, superlink, settings, None)

    with pytest.raises(CliError, match=r'cannot be simulated.*library = "flower"') as error:
        make_settings(OPTIONS, config, superlink, run="sim", folder=tmp_path, first_round=1, model=None)
    assert error.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (
            "slow_s",
            "1",
            "--set: the run configuration of the task has no key `slow_s`: did you mean `slow-s`",
        ),
        ("zzz", "1", "no key `zzz`: known keys: dies, dies-in, hold, num-server-rounds, "),
        ("slow-s", "nan", "--set: `slow-s` = nan: use a finite number; the task has 0.0"),
        ("slow-s", "-inf", "use a finite number"),
        ("raises", "1.0", "--set: `raises` = 1.0: use an integer; the task has -1"),
        ("poison", "1", "--set: `poison` = 1: use true or false; the task has false"),
        ("aggregation.mode", "async", "For keys of .tool.fedbus.aggregation., use --aggregation$"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(
    task: Task, settings: Settings, key: str, text: str, message: str
) -> None:
    with pytest.raises(CliError, match=message) as error:
        make_config(replace(OPTIONS, overrides={key: text}), task, settings, None)
    assert error.value.code == ExitCode.USAGE


def test_an_override_has_the_type_of_the_task(task: Task, settings: Settings) -> None:
    overrides = {"slow-s": "1", "raises": "2", "poison": "true", "hold": "1.10"}
    config = make_config(replace(OPTIONS, overrides=overrides), task, settings, None)

    assert config.overrides == {"slow-s": 1.0, "raises": 2, "poison": True, "hold": "1.10"}
    assert isinstance(config.overrides["slow-s"], float)


def test_an_unknown_partition_is_refused(tmp_path: Path, task: Task, settings: Settings) -> None:
    with pytest.raises(CliError, match=r"--partition: .*'dirichle:1' is unknown") as error:
        make_config(replace(OPTIONS, partition="dirichle:1", data_dir=tmp_path), task, settings, None)
    assert error.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("code", "is_used"),
    [
        ("data = client_data('mnist', context.node_config)", True),
        ("text = node_config.get('partition')", True),
        ("number = node_config['partition-id']", False),
    ],
)
def test_a_partition_that_the_code_ignores_is_a_warning(
    tmp_path: Path, task: Task, settings: Settings, code: str, is_used: bool
) -> None:
    (tmp_path / "client.py").write_text(code)
    config = make_config(replace(OPTIONS, partition="iid", data_dir=tmp_path), task, settings, None)
    warning = warn_of_partition(config, task.model_copy(update={"path": str(tmp_path)}))

    assert (warning == "") is is_used
    assert is_used or warning.startswith("--partition iid seems to have no effect")


def test_a_partition_needs_the_data_folder(settings: Settings) -> None:
    with pytest.raises(CliError, match=r"the data folder .*data \(the default\) does not exist") as error:
        find_data_dir(replace(OPTIONS, partition="iid"), settings)
    assert error.value.code == ExitCode.NOT_FOUND


def test_a_configured_data_folder_must_exist(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, configured_data_dir=tmp_path / "no")

    with pytest.raises(CliError, match=r"no \(FEDBUS_DATA_DIR\) does not exist"):
        find_data_dir(OPTIONS, settings)


def test_an_app_with_its_own_data_needs_no_folder(settings: Settings) -> None:
    assert find_data_dir(OPTIONS, settings) is None


def test_a_path_without_a_task_is_named(settings: Settings) -> None:
    with pytest.raises(CliError, match="/no/task is not a directory") as error:
        load_task("/no/task", settings)
    assert error.value.code == ExitCode.NOT_FOUND


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f,1")

    assert find_gpus(2) == ("3", "GPU-5f")


def test_gpus_that_are_absent_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")

    with pytest.raises(
        CliError, match=r"--gpus 1: this machine has none \(CUDA_VISIBLE_DEVICES=-1\)"
    ) as error:
        find_gpus(1)
    assert error.value.code == ExitCode.MACHINE
