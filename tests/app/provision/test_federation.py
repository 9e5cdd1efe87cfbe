"""Members of a federation: their names, their claims, and the files with its secrets."""

import re
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck as Health
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trusted_bus import FED

from fedbus.app.failures import CliError
from fedbus.app.provision.federation import Federation
from fedbus.app.provision.keys import Key, KeyType
from fedbus.contracts.credentials import decode_claims, extract_jwt
from fedbus.contracts.identifiers import ID_PATTERN, BadId, check_id

invalid_names = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "*",
            ">",
            ".",
            "..",
            "c1.*",
            "c1.>",
            "c1 ",
            " c1",
            "c1\n",
            "C1",
            "c_1",
            "é",
            "{{name()}}",
            "server",
            "",
        ]
    ),
    st.from_regex(r"[a-z0-9-]{0,10}[*>. \t\r\n/\\{}$A-Z_][a-z0-9*>. -]{0,10}", fullmatch=True),
    st.builds(
        lambda text, size: (text * size)[:size],
        st.from_regex(r"[a-z0-9-]{1,4}", fullmatch=True),
        st.integers(64, 80),
    ),
    st.from_regex(r"-[a-z0-9-]{0,10}", fullmatch=True),
).filter(lambda name: not _is_valid_name(name))


def _is_valid_name(name: str) -> bool:
    return re.fullmatch(ID_PATTERN[1:-1], name) is not None and name not in ("server", "people")


@settings(max_examples=1000, deadline=None, suppress_health_check=list(Health))
@given(name=invalid_names)
def test_an_invalid_client_name_is_refused(federation: Federation, name: str) -> None:
    with pytest.raises((BadId, CliError)):
        federation.admit(name)
    assert name not in federation.registry.clients


def test_a_line_break_is_not_part_of_a_name() -> None:
    with pytest.raises(BadId):
        check_id("client", "c1\n")


def test_secret_files_have_mode_600(federation: Federation, tmp_path: Path) -> None:
    federation.admit("secretive").write(tmp_path / "kit")
    secret = [
        *federation.folder.rglob("*.nk"),
        *federation.folder.rglob("*.key"),
        *federation.folder.rglob("*.creds"),
        *(tmp_path / "kit").rglob("*.creds"),
    ]
    assert len(secret) > 20
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_no_secret_is_in_a_repr_or_a_public_file(federation: Federation) -> None:
    key = Key.generate(KeyType.USER)
    assert key._seed not in repr(key)
    for path in (federation.nats_folder / "nats.conf", federation.folder / "federation.json"):
        text = path.read_text()
        for seed in federation.folder.rglob("*.nk"):
            assert seed.read_text().strip() not in text


def test_a_second_federation_in_one_folder_is_refused(federation: Federation) -> None:
    with pytest.raises(CliError, match="already has a federation"):
        Federation.create(federation.folder, FED, hosts=["localhost"], port=4222)


def test_a_member_cannot_be_added_again(federation: Federation) -> None:
    federation.admit("once")
    with pytest.raises(CliError, match="rotate once"):
        federation.admit("once")


def test_user_claims_have_no_permissions(federation: Federation) -> None:
    """The signing key has them, so they cannot be forged in a kit."""
    claims = decode_claims(extract_jwt(federation.admit("plain").creds))
    assert set(claims["nats"]) == {"type", "version", "issuer_account", "tags"}
    assert claims["nats"]["tags"] == ["federation:test", "role:device"], "tags that give no permission"
