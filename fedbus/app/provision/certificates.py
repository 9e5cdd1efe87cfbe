"""The certificate authority (CA) of the federation, and the certificates of its servers.

There is one CA for NATS, S3 and the dashboard. Devices trust no other CA.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.provision.keys import write_secret

CA_DAYS: Final = 3650
SERVER_DAYS: Final = 397
"""The maximum that browsers accept, which the dashboard needs."""
CLOCK_SKEW: Final = timedelta(hours=1)
"""Tolerated lag of a device's clock: a new certificate is valid from this time before now."""


def make_authority(federation: str, certificate: Path, key: Path) -> None:
    """Create a CA and write its certificate and key."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = _subject_name(f"fedbus {federation}")
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    usage = _key_usage(signs_certificates=True)
    builder = (
        _certificate_builder(name, name, private.public_key(), CA_DAYS)
        .add_extension(constraints, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    )
    _save(builder.sign(private, hashes.SHA256()), private, certificate, key)


def make_server_certificate(
    authority: Path, authority_key: Path, hosts: Sequence[str], certificate: Path, key: Path
) -> None:
    """Issue a certificate for all of *hosts*, which are names and IP addresses."""
    ca = read_certificate(authority)
    ca_key = serialization.load_pem_private_key(authority_key.read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    private = ec.generate_private_key(ec.SECP256R1())
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = (
        _certificate_builder(_subject_name(hosts[0]), ca.subject, private.public_key(), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(authority_id, critical=False)
    )
    _save(builder.sign(ca_key, hashes.SHA256()), private, certificate, key)


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM file.

    Raises:
        CliError: It cannot be read, or has no certificate.

    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}", ExitCode.NOT_FOUND) from None
    except ValueError:
        raise CliError(f"{path} has no certificate", ExitCode.NOT_FOUND) from None


def read_first_pem(path: Path) -> str:
    """Read the first certificate in *path* as PEM; of a renewed CA, the newest.

    Raises:
        CliError: The file cannot be read, or has no certificate.

    """
    return read_certificate(path).public_bytes(serialization.Encoding.PEM).decode()


def read_authorities(path: Path) -> list[x509.Certificate]:
    """Read all CA certificates in *path*, the newest first.

    Raises:
        CliError: The file cannot be read, or has no certificate.

    """
    read_certificate(path)
    return x509.load_pem_x509_certificates(path.read_bytes())


def common_name_of(name: x509.Name) -> str:
    """Return the common name, for example ``fedbus dev`` for the CA of federation dev."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _certificate_builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _subject_name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _save(
    certificate: x509.Certificate, private: ec.EllipticCurvePrivateKey, path: Path, key_path: Path
) -> None:
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(key_path, pem.decode())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
