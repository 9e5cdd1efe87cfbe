"""Kits: what a device gets, and how it is read."""

import os
import stat
import tarfile
from pathlib import Path

import pytest

from fedbus.app.failures import CliError
from fedbus.app.provision.federation import Federation
from fedbus.app.provision.keys import Key, KeyType
from fedbus.app.provision.kit import complete_kit
from fedbus.app.settings import InvalidSetting, Settings, apply_kit
from fedbus.bus.credentials import BusAccess
from fedbus.contracts.credentials import parse_user


def test_a_kit_has_all_that_a_device_needs(federation: Federation, tmp_path: Path) -> None:
    (federation.folder / "allowed_signers").write_text("who ssh-ed25519 AAAA\n")
    federation.admit("kitted").write(tmp_path / "kit")
    environment = apply_kit({"FEDBUS_KIT": str(tmp_path / "kit")})
    settings_of_kit = Settings.from_environment(environment)

    assert (settings_of_kit.nats_url, settings_of_kit.federation, settings_of_kit.client) == (
        "tls://localhost:4222",
        "test",
        "kitted",
    )
    assert settings_of_kit.access == BusAccess(tmp_path / "kit" / "client.creds", tmp_path / "kit" / "ca.pem")
    assert environment["AWS_CA_BUNDLE"] == environment["FEDBUS_CA"]
    assert Path(environment["FEDBUS_ALLOWED_SIGNERS"]).read_text() == "who ssh-ed25519 AAAA\n"
    assert parse_user(settings_of_kit.access.creds.read_text()).name == "kitted"  # type: ignore[union-attr]


def test_a_kit_does_not_override_the_environment(federation: Federation, tmp_path: Path) -> None:
    federation.admit("overruled").write(tmp_path / "kit")
    environment = {"FEDBUS_KIT": str(tmp_path / "kit"), "FEDBUS_NATS_URL": "tls://leaf:4222"}
    assert apply_kit(environment)["FEDBUS_NATS_URL"] == "tls://leaf:4222"


def test_a_folder_without_settings_is_not_a_kit(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="is not a kit"):
        apply_kit({"FEDBUS_KIT": str(tmp_path)})


def test_a_kit_can_be_a_tar_file(federation: Federation, tmp_path: Path) -> None:
    federation.admit("packed").write(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "packed.tar") as tar:
        modes = {entry.name: entry.mode for entry in tar.getmembers()}
    assert modes["packed/client.creds"] == 0o600
    assert {"packed/ca.pem", "packed/settings.env"} <= modes.keys()
    assert stat.S_IMODE((tmp_path / "packed.tar").stat().st_mode) & 0o077 == 0


def test_a_device_s_own_key_never_leaves_it(federation: Federation, tmp_path: Path) -> None:
    own = Key.generate(KeyType.USER)
    federation.admit("own-key", public_key=own.public).write(tmp_path / "kit")
    kit = tmp_path / "kit" / "client.creds"
    assert "SEED" not in kit.read_text()

    assert complete_kit(tmp_path / "kit", own) == "own-key"
    assert "SEED" in kit.read_text()
    with pytest.raises(CliError, match="the kit is for the key"):
        complete_kit(tmp_path / "kit", Key.generate(KeyType.USER))


def test_no_variable_of_a_test_remains() -> None:
    assert "FEDBUS_KIT" not in os.environ
