"""The signature under a model: real keys, real files, and manifests that were written and read again."""

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

MODEL_TIME = Manifest(
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


def pair(directory: Path, name: str = "fedbus.key") -> tuple[ModelSigner, TrustedKeys]:
    public = generate_key(directory / name)
    return ModelSigner.load(directory / name), TrustedKeys.load(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSigner, TrustedKeys]:
    return pair(tmp_path_factory.mktemp("keys"))


def test_a_private_key_is_for_its_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
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
def test_what_was_signed_written_and_read_again_is_still_signed(
    keys: tuple[ModelSigner, TrustedKeys],
    metrics: dict[str, float],
    participants: dict[str, int],
    config: dict[str, bool | int | float | str],
    created: datetime,
) -> None:
    signer, trusted = keys
    changed = {"metrics": metrics, "participants": participants, "config": config, "created": created}
    sealed = signer.sign(MODEL_TIME.model_copy(update=changed))
    trusted.verify_manifest(Manifest.model_validate_json(sealed.model_dump_json(indent=2)))


def test_the_reference_and_the_seal_are_enough(keys: tuple[ModelSigner, TrustedKeys]) -> None:
    signer, trusted = keys
    trusted.verify("mnist", MODEL_TIME.ref, signer.sign(MODEL_TIME).seal)


def test_a_model_without_a_signature_is_refused(keys: tuple[ModelSigner, TrustedKeys]) -> None:
    with pytest.raises(SignatureMissing, match="version 3 of mnist is not signed"):
        keys[1].verify("mnist", MODEL_TIME.ref, None)


@pytest.mark.parametrize(
    "changed", [{"version": 4}, {"sha256": "c" * 64}, {"size_bytes": 101}, {"architecture": "c" * 64}]
)
def test_a_signature_is_of_one_model_only(
    keys: tuple[ModelSigner, TrustedKeys], changed: dict[str, object]
) -> None:
    signer, trusted = keys
    with pytest.raises(SignatureInvalid, match="does not match this model"):
        trusted.verify("mnist", MODEL_TIME.ref.model_copy(update=changed), signer.sign(MODEL_TIME).seal)


def test_a_signature_is_of_one_task_only(keys: tuple[ModelSigner, TrustedKeys]) -> None:
    with pytest.raises(SignatureInvalid, match="does not match this model"):
        keys[1].verify("cifar", MODEL_TIME.ref, keys[0].sign(MODEL_TIME).seal)


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
def test_a_manifest_that_was_changed_afterwards_is_found(
    keys: tuple[ModelSigner, TrustedKeys], changed: dict[str, object]
) -> None:
    signer, trusted = keys
    with pytest.raises(SignatureInvalid, match="was changed after it was signed"):
        trusted.verify_manifest(signer.sign(MODEL_TIME).model_copy(update=changed))


def test_a_stranger_cannot_sign(keys: tuple[ModelSigner, TrustedKeys], tmp_path: Path) -> None:
    stranger, _ = pair(tmp_path)
    seal = stranger.sign(MODEL_TIME).seal
    assert seal is not None
    with pytest.raises(SignatureInvalid, match=f"signed with the key {stranger.key_id}"):
        keys[1].verify("mnist", MODEL_TIME.ref, seal)
    borrowed = ModelSignature(key=keys[0].key_id, manifest=seal.manifest, signature=seal.signature)
    with pytest.raises(SignatureInvalid, match="does not match this model"):
        keys[1].verify("mnist", MODEL_TIME.ref, borrowed)


def test_two_keys_are_trusted_while_one_takes_over_from_the_other(tmp_path: Path) -> None:
    (old, _), (new, _) = pair(tmp_path, "old"), pair(tmp_path, "new")
    both = tmp_path / "trusted"
    both.write_text(
        f"# until March\n{(tmp_path / 'old.pub').read_text()}\n{(tmp_path / 'new.pub').read_text()}"
    )
    trusted = TrustedKeys.load(both)
    trusted.verify_manifest(old.sign(MODEL_TIME))
    trusted.verify_manifest(new.sign(MODEL_TIME))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no key"),
        ("# nothing but words\n", "holds no key"),
        ("ssh-ed25519 AAAA me@here\n", "no public key of fedbus model keygen"),
        ("ed25519 AAAA\n", "no public key of fedbus model keygen"),
        ("ed25519 ???\n", "no public key of fedbus model keygen"),
    ],
)
def test_a_file_that_holds_no_public_keys_is_told(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "trusted"
    path.write_text(content)
    with pytest.raises(InvalidKey, match=says):
        TrustedKeys.load(path)


def test_a_private_key_given_to_a_device_is_told(tmp_path: Path) -> None:
    generate_key(tmp_path / "key")
    with pytest.raises(InvalidKey, match=r"stay on the server; give the file that ends in \.pub"):
        TrustedKeys.load(tmp_path / "key")


def test_a_public_key_given_to_the_server_is_told(tmp_path: Path) -> None:
    public = generate_key(tmp_path / "key")
    with pytest.raises(InvalidKey, match="holds no private key"):
        ModelSigner.load(public)
