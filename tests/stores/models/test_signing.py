"""Signatures of models, with real keys and files."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.model import Manifest, ModelSignature
from fedbus.stores.models.signing import (
    InvalidKey,
    ModelSigner,
    SignatureInvalid,
    SignatureMissing,
    TrustedKeys,
    generate_key,
)

MANIFEST = Manifest(
    sha256="a" * 64,
    size_bytes=100,
    architecture="b" * 64,
    version=3,
    task="mnist",
    created=datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC),
    parent=2,
    run="mnist-2",
    rounds=4,
    participants={"c1": 20},
    metrics={"loss": 0.1},
)


def make_keys(directory: Path, name: str = "fedbus.key") -> tuple[ModelSigner, TrustedKeys]:
    public = generate_key(directory / name)
    return ModelSigner.load(directory / name), TrustedKeys.load(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSigner, TrustedKeys]:
    return make_keys(tmp_path_factory.mktemp("keys"))


def test_a_private_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "fedbus.key"
    generate_key(path)
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InvalidKey, match="never overwritten"):
        generate_key(path)
    assert path.read_bytes() == before


@given(
    st.dictionaries(st.text(max_size=20), st.floats(), max_size=5),
    st.dictionaries(st.text(max_size=20), st.integers(0, 2**53), max_size=5),
    st.dictionaries(st.text(max_size=20), st.booleans() | st.integers() | st.text(max_size=20), max_size=5),
    st.datetimes(timezones=st.just(UTC)),
)
def test_a_signature_survives_serialisation(
    keys: tuple[ModelSigner, TrustedKeys],
    metrics: dict[str, float],
    participants: dict[str, int],
    config: dict[str, bool | int | float | str],
    created: datetime,
) -> None:
    signer, trusted = keys
    changed = {"metrics": metrics, "participants": participants, "config": config, "created": created}
    signed = signer.sign(MANIFEST.model_copy(update=changed))
    trusted.verify_manifest(Manifest.model_validate_json(signed.model_dump_json(indent=2)))


def test_the_reference_and_the_signature_are_enough(keys: tuple[ModelSigner, TrustedKeys]) -> None:
    signer, trusted = keys
    trusted.verify("mnist", MANIFEST.ref, signer.sign(MANIFEST).seal)


def test_a_model_without_a_signature_is_rejected(keys: tuple[ModelSigner, TrustedKeys]) -> None:
    with pytest.raises(SignatureMissing, match="version 3 of mnist is not signed"):
        keys[1].verify("mnist", MANIFEST.ref, None)


@pytest.mark.parametrize(
    "changed", [{"version": 4}, {"sha256": "c" * 64}, {"size_bytes": 101}, {"architecture": "c" * 64}]
)
def test_a_signature_is_valid_for_one_model_only(
    keys: tuple[ModelSigner, TrustedKeys], changed: dict[str, object]
) -> None:
    signer, trusted = keys
    with pytest.raises(SignatureInvalid, match="does not match this model"):
        trusted.verify("mnist", MANIFEST.ref.model_copy(update=changed), signer.sign(MANIFEST).seal)


def test_a_signature_is_valid_for_one_task_only(keys: tuple[ModelSigner, TrustedKeys]) -> None:
    with pytest.raises(SignatureInvalid, match="does not match this model"):
        keys[1].verify("cifar", MANIFEST.ref, keys[0].sign(MANIFEST).seal)


@pytest.mark.parametrize(
    "changed",
    [
        {"metrics": {"loss": 0.01}},
        {"participants": {"c1": 21}},
        {"parent": 1},
        {"code_version": "f" * 40},
        {"lineage": 2},
    ],
)
def test_a_manifest_that_was_changed_is_rejected(
    keys: tuple[ModelSigner, TrustedKeys], changed: dict[str, object]
) -> None:
    signer, trusted = keys
    with pytest.raises(SignatureInvalid, match="was changed after it was signed"):
        trusted.verify_manifest(signer.sign(MANIFEST).model_copy(update=changed))


def test_an_untrusted_key_cannot_sign(keys: tuple[ModelSigner, TrustedKeys], tmp_path: Path) -> None:
    untrusted, _ = make_keys(tmp_path)
    seal = untrusted.sign(MANIFEST).seal
    assert seal is not None
    with pytest.raises(SignatureInvalid, match=f"signed with the key {untrusted.key_id}"):
        keys[1].verify("mnist", MANIFEST.ref, seal)
    forged = ModelSignature(key=keys[0].key_id, manifest=seal.manifest, signature=seal.signature)
    with pytest.raises(SignatureInvalid, match="does not match this model"):
        keys[1].verify("mnist", MANIFEST.ref, forged)


def test_two_keys_can_be_trusted_during_a_rotation(tmp_path: Path) -> None:
    (old, _), (new, _) = make_keys(tmp_path, "old"), make_keys(tmp_path, "new")
    both = tmp_path / "trusted"
    both.write_text(
        f"# until March\n{(tmp_path / 'old.pub').read_text()}\n{(tmp_path / 'new.pub').read_text()}"
    )
    trusted = TrustedKeys.load(both)
    trusted.verify_manifest(old.sign(MANIFEST))
    trusted.verify_manifest(new.sign(MANIFEST))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("ssh-ed25519 AAAA me@here\n", "no public key of fedbus model keygen"),
        ("ed25519 AAAA\n", "no public key of fedbus model keygen"),
        ("ed25519 ???\n", "no public key of fedbus model keygen"),
    ],
)
def test_a_file_without_public_keys_is_rejected(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "trusted"
    path.write_text(content)
    with pytest.raises(InvalidKey, match=reason):
        TrustedKeys.load(path)


def test_a_private_key_on_a_device_is_rejected(tmp_path: Path) -> None:
    generate_key(tmp_path / "key")
    with pytest.raises(InvalidKey, match=r"stay on the server; give the file that ends in \.pub"):
        TrustedKeys.load(tmp_path / "key")


def test_a_public_key_on_the_server_is_rejected(tmp_path: Path) -> None:
    public = generate_key(tmp_path / "key")
    with pytest.raises(InvalidKey, match="holds no private key"):
        ModelSigner.load(public)
