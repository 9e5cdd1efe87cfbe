"""The keys of one run: the certificate of its SuperLink, and the key of each SuperNode.

The SuperLink's certificate is self-signed. Each client gets it over the bus and trusts no other one, so it needs no
certificate authority. A SuperNode makes its own key, and fedbus registers the public one at the SuperLink.
"""

import ipaddress
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID_DAYS: Final = 365
CLOCK_SKEW: Final = timedelta(days=1)
"""Tolerated lag of a device's clock."""


def make_server_certificate(hosts: Iterable[str], certificate: Path, key: Path) -> None:
    """Write a certificate for all of *hosts*, which are names and IP addresses, and its key."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedbus SuperLink")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    write_private(
        key,
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def make_node_key(key: Path) -> str:
    """Write a private key for a SuperNode in the format that it reads, and return the public key as PEM."""
    private = ec.generate_private_key(ec.SECP384R1())
    write_private(
        key,
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return public.decode()


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
