"""Fleets of real agents under virtual time."""

import io
import json
import os
import signal
import sys
from typing import Any

import pytest

from fedbus.contracts.task.task import Task
from fedbus.simulation.fleet.fleet import simulate_fleet
from fedbus.simulation.fleet.settings import FleetProgress, FleetSettings
from fedbus.simulation.profiles.reader import parse_profile
from fedbus.simulation.profiles.schema import Profile
from fedbus.simulation.settings import BadSettings

SLOW_HALF = """
groups:
  quick: {share: 0.5, training: {seconds: 2}}
  slow: {training: {seconds: 12}, latency: 0.1}
"""
ABSENT = """
groups:
  all: {disconnections: {every-s: 60, duration: 15}, training: {seconds: 2}}
"""


def make_settings(task: Task, **changes: Any) -> FleetSettings:
    values = {
        "clients": 4,
        "duration_s": 90.0,
        "every_s": 20.0,
        "start_within_s": 5.0,
        "train_s": 3.0,
    } | changes
    return FleetSettings(task=task, **values)


def read_log(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def profile_of(text: str) -> Profile:
    return parse_profile(text, "test.yaml")


def test_runs_finish_and_publish_versions(task: Task) -> None:
    result = simulate_fleet(make_settings(task))
    assert [run.state for run in result.runs[:2]] == ["finished", "finished"]
    assert result.runs[1].rounds == 2
    assert result.runs[1].trainings == 8
    assert result.participation == 1.0
    assert result.transitions["client", "learning"] >= 8
    assert result.restarts == 0


def test_a_seed_reproduces_the_log_byte_for_byte(task: Task) -> None:
    logs = [io.StringIO() for _ in range(3)]
    settings = make_settings(task, profile=profile_of(ABSENT))
    results = [
        simulate_fleet(settings, log=logs[0]),
        simulate_fleet(settings, log=logs[1]),
        simulate_fleet(make_settings(task, profile=profile_of(ABSENT), seed=1), log=logs[2]),
    ]
    assert logs[0].getvalue() == logs[1].getvalue()
    assert results[0].log_sha256 == results[1].log_sha256 != results[2].log_sha256
    assert read_log(logs[0])


def test_a_slow_client_misses_its_rounds(task: Task) -> None:
    settings = make_settings(task, profile=profile_of(SLOW_HALF), round_s=8.0, quorum=4)
    result = simulate_fleet(settings)
    assert result.runs[0].state == "finished"
    assert (result.runs[0].trainings, result.runs[0].failures) == (8, 4)


def test_only_the_cohort_trains(task: Task) -> None:
    result = simulate_fleet(make_settings(task, cohort=2))
    assert result.runs[1].trainings == 4


def test_a_missed_quorum_fails_the_run_with_the_reason(task: Task) -> None:
    result = simulate_fleet(
        make_settings(task, quorum=4, recruit_s=3.0, start_within_s=60.0, duration_s=30.0)
    )
    assert result.runs[0].state == "failed"
    assert "of 4 clients joined in time" in result.runs[0].reason


def test_the_progress_is_reported(task: Task) -> None:
    reports: list[FleetProgress] = []
    simulate_fleet(make_settings(task, duration_s=200.0), observer=reports.append)
    assert reports
    assert 0 < reports[0].simulated_s < reports[0].duration_s
    assert reports[0].run.startswith("tiny-")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": 0}, "clients is 0"),
        ({"duration_s": -1.0}, "duration_s is -1"),
        ({"cohort": 9}, r"the cohort has 9 clients \(limit 4"),
        ({"quorum": 9}, r"the quorum has 9 clients \(limit 4"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(task: Task, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSettings, match=message):
        make_settings(task, **changes)


def test_an_interrupted_fleet_ends_without_restarts_or_errors(
    task: Task, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: FleetProgress) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        simulate_fleet(make_settings(task, duration_s=200.0), observer=interrupt)
    assert capfd.readouterr().err == ""


def test_without_the_extra_the_package_to_install_is_named(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fedbus.simulation.fleet.virtual_time", raising=False)
    monkeypatch.setitem(sys.modules, "async_solipsism", None)
    with pytest.raises(BadSettings, match=r"needs async_solipsism.*pip install 'fedbus\[simulation\]'"):
        simulate_fleet(make_settings(task))
