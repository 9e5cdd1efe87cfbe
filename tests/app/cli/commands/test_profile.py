"""`fedbus profile`, and the options `--profile` of commands that start clients."""

from pathlib import Path

import pytest
from support.cli import CliResult, run_fedbus

from fedbus.simulation.profiles.reader import builtin_profiles, load_profile

TINY_TASK = Path(__file__).parents[3] / "support" / "tiny_task"


def run_cli(home: Path, *arguments: str | Path) -> CliResult:
    environment = {"FEDBUS_HOME": str(home), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return run_fedbus(*map(str, arguments), environment=environment)


def test_ls_lists_the_built_in_profiles(tmp_path: Path) -> None:
    listed = run_cli(tmp_path, "profile", "ls", "--json").facts
    assert [one["name"] for one in listed] == builtin_profiles()
    table = run_cli(tmp_path, "profile", "ls").out
    assert "delay-s=3, probability=1.0" in table


def test_show_counts_the_clients_of_each_group(tmp_path: Path) -> None:
    shown = run_cli(tmp_path, "profile", "show", "three-device-groups", "--clients", "9", "--json").facts
    assert shown["clients"] == {"fast-device": 3, "medium-device": 3, "slow-device": 3}
    table = run_cli(
        tmp_path, "profile", "show", "delay-study:delay-s=4,probability=0.6", "--clients", "3"
    ).out
    assert "4 s, in 60 % of all cases" in table
    assert "bandwidth" not in table  # no group has one


def test_show_names_clients_without_a_group(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("groups: {slow: {share: 0.25, delay: 2}}")
    lines = run_cli(tmp_path, "profile", "show", file, "--clients", "8").out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["group", "slow", "(no", "group)"],
        ["clients", "2", "6"],
        ["training", "time", "as", "measured", "as", "measured"],
        ["delay", "of", "a", "reply", "2", "s", "-"],
    ]


def test_show_explains_conditions_in_plain_text(tmp_path: Path) -> None:
    table = run_cli(tmp_path, "profile", "show", "mobile").out
    assert table.startswith("mobile: Phones on a mobile network")
    for text in (
        "3 × the measured time",
        "60 ms (median; lognormal, σ 0.5)",
        "20 Mbit/s down, 5 Mbit/s up",
        "1 %, sent again",
        "on average every 15 min, each for 20 s on average (exponential)",
        "60 % of the time, in periods of about 1 h",
        "22:00-07:00, in time zones over 2 h",
    ):
        assert text in table


def test_show_yaml_prints_a_file_to_start_from(tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text(run_cli(tmp_path, "profile", "show", "mobile", "--yaml").out)
    assert load_profile(file) == load_profile("mobile")


def test_check_accepts_a_valid_profile(tmp_path: Path) -> None:
    assert run_cli(tmp_path, "profile", "check", "mobile").out == "mobile is valid: 2 groups\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("groups:\n  a:\n    dealy: 3", "p.yaml:3: groups.a.dealy is not a known key. Did you mean `delay`?"),
        ("groups: {a: {count: 200}}", "have 200 clients in total, and only 100 of 100 are left for them"),
    ],
)
def test_check_reports_problems_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    done = run_cli(tmp_path, "profile", "check", file)
    assert done.code == 2
    assert problem in done.err
    assert done.err.count("\n") == 1


def test_missing_profile_has_its_exit_code(tmp_path: Path) -> None:
    done = run_cli(tmp_path, "profile", "show", "moble")
    assert done.code == 5
    assert "Did you mean 'mobile'?" in done.err


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (("client", "up", "c1", "--profile", "moble"), "Did you mean 'mobile'?"),
        (("client", "up", "c1", "--profile", "mobile", "--profile-group", "car"), "has no group 'car'"),
        (
            ("client", "up", "c1", "--profile-seed", "3"),
            "--profile-group and --profile-seed require --profile",
        ),
        (("up", "--profile", "moble"), "Did you mean 'mobile'?"),
        (("up", "--profile-seed", "3"), "--profile-seed requires --profile"),
    ],
)
def test_commands_refuse_a_bad_profile_before_they_start(
    tmp_path: Path, command: tuple[str, ...], problem: str
) -> None:
    done = run_cli(tmp_path, *command, "--task", TINY_TASK)
    assert done.code in (2, 5)
    assert problem in done.err
    assert not (tmp_path / "nats").exists()
