"""The unit files, as systemd itself reads them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deploy.manifests import DEPLOY
from deploy.test_k3s import known_variables

from fedbus.app.failures import ExitCode

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed, and judges these"
)
MOST_EXPOSED = 30
"""Of a hundred, as `systemd-analyze security` counts; a unit without any hardening has 96."""


def install_unit(unit: Path, directory: Path) -> Path:
    """*unit* as on a machine where fedbus is where this Python is."""
    program = Path(sys.executable).with_name("fedbus")
    copy = directory / unit.name.replace("@.", "@c1.")
    copy.write_text(unit.read_text().replace("/opt/fedbus/bin/fedbus", str(program)))
    return copy


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@needs_systemd
@each_unit
def test_systemd_has_nothing_to_say_against_it(unit: Path, tmp_path: Path) -> None:
    found = analyze("verify", "--man=no", "--recursive-errors=no", str(install_unit(unit, tmp_path)))
    assert (found.returncode, found.stderr) == (0, "")


@needs_systemd
@each_unit
def test_it_may_do_little(unit: Path, tmp_path: Path) -> None:
    found = analyze(
        "security", "--offline=yes", f"--threshold={MOST_EXPOSED}", str(install_unit(unit, tmp_path))
    )
    assert found.returncode == 0, found.stdout[-600:]


@each_unit
def test_what_no_restart_mends_is_not_started_again(unit: Path) -> None:
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit.read_text(), re.MULTILINE)
    hopeless = {int(code) for name, code in ExitCode.__members__.items() if name in ("USAGE", "DENIED")}
    assert {int(code) for code in codes.split()} >= hopeless
    assert int(ExitCode.FAILED) not in {int(code) for code in codes.split()}


@pytest.mark.parametrize("name", ["client-example.env", "agent-example.env"])
def test_a_device_s_settings_lead_to_its_kit_and_hold_nothing_that_nobody_reads(name: str) -> None:
    given = settings_in(name)
    assert given.keys() - {"AGENT_OPTIONS"} <= known_variables()
    assert given["FEDBUS_KIT"] == "/etc/fedbus/kits/c1"
    assert "FEDBUS_NATS_URL" not in given, "which is in the kit, and would win over it"


def test_the_agents_of_a_device_may_write_into_the_directory_that_they_share() -> None:
    unit = (DEPLOY / "systemd" / "fedbus-agent@.service").read_text()
    (writable,) = re.findall(r"^StateDirectory=(.*)$", unit, re.MULTILINE)
    home = Path(settings_in("agent-example.env")["FEDBUS_HOME"])
    assert home.is_relative_to(Path("/var/lib") / writable)


def settings_in(name: str) -> dict[str, str]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


@each_unit
def test_its_command_is_one_that_fedbus_has(unit: Path) -> None:
    (command,) = re.findall(r"^ExecStart=/opt/fedbus/bin/fedbus (.*)$", unit.read_text(), re.MULTILINE)
    words = [word for word in command.split() if word[0] not in "%$"]
    known = subprocess.run(
        [sys.executable, "-m", "fedbus.app.cli.main", *words, "--help"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert known.returncode == 0, known.stderr
