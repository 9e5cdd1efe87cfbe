"""The unit files, verified by systemd-analyze."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deploy.manifests import DEPLOY
from deploy.test_k3s import known_variables
from support.cli import clean_environment, run_fedbus

from fedbus.app.failures import ExitCode

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
MAX_EXPOSURE = 30
"""Limit of the exposure by `systemd-analyze security`, of 100; a unit without hardening has 96."""


def install_unit(unit: Path, directory: Path) -> Path:
    """Copy *unit* with the path of the fedbus program of this Python."""
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
def test_each_unit_is_valid(unit: Path, tmp_path: Path) -> None:
    result = analyze("verify", "--man=no", "--recursive-errors=no", str(install_unit(unit, tmp_path)))
    assert (result.returncode, result.stderr) == (0, "")


@needs_systemd
@each_unit
def test_each_unit_is_hardened(unit: Path, tmp_path: Path) -> None:
    result = analyze(
        "security", "--offline=yes", f"--threshold={MAX_EXPOSURE}", str(install_unit(unit, tmp_path))
    )
    assert result.returncode == 0, result.stdout[-600:]


@each_unit
def test_permanent_errors_are_not_restarted(unit: Path) -> None:
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit.read_text(), re.MULTILINE)
    permanent = {int(code) for name, code in ExitCode.__members__.items() if name in ("USAGE", "DENIED")}
    assert {int(code) for code in codes.split()} >= permanent
    assert int(ExitCode.FAILED) not in {int(code) for code in codes.split()}


@pytest.mark.parametrize("name", ["client-example.env", "agent-example.env"])
def test_the_example_settings_are_known_and_use_the_kit(name: str) -> None:
    settings = settings_in(name)
    assert settings.keys() - {"AGENT_OPTIONS"} <= known_variables()
    assert settings["FEDBUS_KIT"] == "/etc/fedbus/kits/c1"
    assert "FEDBUS_NATS_URL" not in settings, "it would override the URL in the kit"


def test_the_agents_of_a_device_can_write_to_their_home() -> None:
    unit = (DEPLOY / "systemd" / "fedbus-agent@.service").read_text()
    (writable,) = re.findall(r"^StateDirectory=(.*)$", unit, re.MULTILINE)
    home = Path(settings_in("agent-example.env")["FEDBUS_HOME"])
    assert home.is_relative_to(Path("/var/lib") / writable)


def settings_in(name: str) -> dict[str, str]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


@each_unit
def test_the_command_of_each_unit_exists(unit: Path) -> None:
    (command,) = re.findall(r"^ExecStart=/opt/fedbus/bin/fedbus (.*)$", unit.read_text(), re.MULTILINE)
    arguments = [argument for argument in command.split() if argument[0] not in "%$"]
    result = run_fedbus(*arguments, "--help", environment=clean_environment())
    assert result.code == 0, result.err
