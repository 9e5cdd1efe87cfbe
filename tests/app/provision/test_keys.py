"""Public keys that a person types."""

from pathlib import Path

import pytest

from fedbus.app.failures import CliError
from fedbus.app.provision.keys import Key, KeyType, check_public_key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "U",
        "UAAA",
        "A" * 56,
        Key.generate(KeyType.ACCOUNT).public,
        Key.generate(KeyType.USER).public[:-1] + "1",
    ],
    ids=["nothing", "one letter", "short", "no checksum", "an account's", "a typing error"],
)
def test_an_invalid_public_key_is_refused(text: str) -> None:
    with pytest.raises(CliError, match="is not the public key of a user"):
        check_public_key(text)


def test_a_private_seed_is_refused_with_a_warning(tmp_path: Path) -> None:
    Key.generate(KeyType.USER).save(tmp_path / "device.nk")
    with pytest.raises(CliError, match="this is the private seed"):
        check_public_key((tmp_path / "device.nk").read_text().strip())
