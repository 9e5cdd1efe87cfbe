"""Checks of credentials, the CA and the server certificate, for `fedbus doctor`.

They check dates, signatures, whether key and claims match, the certificate that the server sends, and the clock. Only
the server knows which keys are revoked: if all checks pass and it still denies access, the key is revoked.
"""

import asyncio
import base64
import ssl
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from fedbus.app.failures import CliError
from fedbus.app.finding import SET_CLOCK_ADVICE, DoctorFinding, Severity
from fedbus.app.provision.certificates import common_name_of, read_authorities, read_certificate
from fedbus.app.provision.keys import Key, verify_signature
from fedbus.contracts.credentials import InvalidCredentials, extract_jwt, extract_seed, parse_user

EXPIRY_WARNING: Final = timedelta(days=30)
CONNECT_TIMEOUT_S: Final = 5.0
CREDENTIALS: Final = "credentials"
AUTHORITY: Final = "authority"
CERTIFICATE: Final = "certificate"
NEW_KIT_ADVICE: Final = "get a new kit: fedbus provision rotate NAME, on the machine that has the keys"


def check_credentials(path: Path, now: datetime, *, fed: str = "", client: str = "") -> DoctorFinding:
    """Check the credentials file; with *fed*, also that it is for that federation and *client*."""
    try:
        text = path.read_text()
        claims, seed = parse_user(text), extract_seed(text)
    except OSError as error:
        return _credentials_error(
            f"{path}: {error.strerror}", "copy it from the kit again, readable for this user"
        )
    except InvalidCredentials as error:
        return _credentials_error(f"{path}: {error}", "copy it from the kit again")
    if claims.issued_at > now:
        return _credentials_error(
            f"{claims.name}: issued {claims.issued_at:%Y-%m-%d}, which is in the future of this clock",
            SET_CLOCK_ADVICE,
        )
    if not _is_signed_by(extract_jwt(text), claims.iss):
        return _credentials_error(
            f"{claims.name}: signature invalid, the file is corrupt or forged", NEW_KIT_ADVICE
        )
    if Key(seed).public != claims.sub:
        return _credentials_error(f"{claims.name}: the key does not match the claims", NEW_KIT_ADVICE)
    if fed and (mistake := claims.mismatch(fed, client)):
        return _credentials_error(*mistake.split(": ", 1))
    if path.stat().st_mode & 0o077:
        found = f"{claims.name}: other users of this machine can read the file"
        return DoctorFinding(CREDENTIALS, Severity.WARNING, found, f"chmod 600 {path}")
    return _check_expiry(CREDENTIALS, claims.name, claims.expires_at, now, NEW_KIT_ADVICE)


def _credentials_error(found: str, advice: str) -> DoctorFinding:
    return DoctorFinding(CREDENTIALS, Severity.ERROR, found, advice)


def check_authority(path: Path, now: datetime) -> DoctorFinding:
    """Check the dates of the CA certificate."""
    try:
        ca = read_certificate(path)
    except CliError as failure:
        return DoctorFinding(AUTHORITY, Severity.ERROR, str(failure), "copy ca.pem from the kit again")
    if ca.not_valid_before_utc > now:
        return DoctorFinding(
            AUTHORITY, Severity.ERROR, f"{common_name_of(ca.subject)} {_not_yet_valid(ca)}", SET_CLOCK_ADVICE
        )
    return _check_expiry(AUTHORITY, common_name_of(ca.subject), ca.not_valid_after_utc, now, NEW_KIT_ADVICE)


async def check_server(url: str, ca_path: Path | None, now: datetime) -> DoctorFinding | None:
    """Check the certificate of the server at *url*; None if the server does not use TLS."""
    certificate = await _fetch_certificate(url)
    if certificate is None:
        return None
    try:
        trusted = await asyncio.to_thread(read_authorities, ca_path) if ca_path else []
    except CliError:  # `check_authority` reports it
        trusted = []
    signer = next((ca for ca in trusted if _is_from(certificate, ca)), trusted[0] if trusted else None)
    return check_server_certificate(certificate, signer, urlsplit(url).hostname or "", now)


def check_server_certificate(
    certificate: x509.Certificate, ca: x509.Certificate | None, host: str, now: datetime
) -> DoctorFinding:
    """Check the *certificate* that the server at *host* sent."""
    issuer = common_name_of(certificate.issuer)
    if certificate.not_valid_before_utc > now:
        return _certificate_error(f"server certificate {_not_yet_valid(certificate)}", SET_CLOCK_ADVICE)
    if ca is not None and not _is_from(certificate, ca):
        advice = "use the kit of that federation, or correct FEDBUS_NATS_URL"
        if common_name_of(ca.subject) == issuer:
            advice = "the CA was renewed: copy ca.pem from the server again"
        return _certificate_error(
            f"server certificate was issued by {issuer!r}, but FEDBUS_CA is {common_name_of(ca.subject)!r}",
            advice,
        )
    if host not in (names := _names(certificate)):
        advice = f"use one of {', '.join(sorted(names))}, or add the host: fedbus provision init --host"
        return _certificate_error(f"server certificate is not valid for {host}", advice)
    renew = "fedbus provision rotate --tls, on the machine that has the keys"
    return _check_expiry(
        CERTIFICATE, f"server certificate of {issuer}", certificate.not_valid_after_utc, now, renew
    )


def _certificate_error(found: str, advice: str) -> DoctorFinding:
    return DoctorFinding(CERTIFICATE, Severity.ERROR, found, advice)


def _not_yet_valid(certificate: x509.Certificate) -> str:
    return f"is valid from {certificate.not_valid_before_utc:%Y-%m-%d}, which is in the future of this clock"


def _check_expiry(what: str, name: str, end: datetime | None, now: datetime, advice: str) -> DoctorFinding:
    if end is None:
        return DoctorFinding(what, Severity.OK, f"{name}, valid until revoked")
    if end <= now:
        wrong_clock = f"if this clock is ahead: {SET_CLOCK_ADVICE}"
        return DoctorFinding(
            what, Severity.ERROR, f"{name}: expired on {end:%Y-%m-%d}", f"{advice}; {wrong_clock}"
        )
    if end - now < EXPIRY_WARNING:
        return DoctorFinding(what, Severity.WARNING, f"{name}: expires soon, on {end:%Y-%m-%d}", advice)
    return DoctorFinding(what, Severity.OK, f"{name}, valid until {end:%Y-%m-%d}")


def _is_signed_by(jwt: str, issuer: str) -> bool:
    signed, _, signature = jwt.rpartition(".")
    try:
        raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    except ValueError:
        return False
    return verify_signature(issuer, signed.encode(), raw)


def _is_from(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    key = ca.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or certificate.signature_hash_algorithm is None:
        return False
    try:
        key.verify(
            certificate.signature,
            certificate.tbs_certificate_bytes,
            ec.ECDSA(certificate.signature_hash_algorithm),
        )
    except InvalidSignature:
        return False
    return True


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return set(_name_values(names))


def _name_values(names: x509.SubjectAlternativeName) -> Iterator[str]:
    yield from names.get_values_for_type(x509.DNSName)
    yield from (str(address) for address in names.get_values_for_type(x509.IPAddress))


async def _fetch_certificate(url: str) -> x509.Certificate | None:
    """Read the server certificate without verifying it. Nothing is sent to the server."""
    address = urlsplit(url)
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.hostname, address.port or 4222)
            greeting = await reader.readline()
            if b'"tls_required":true' not in greeting:
                writer.close()
                return None
            await writer.start_tls(unverified, server_hostname=address.hostname)
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
    except (OSError, TimeoutError):
        return None
    return x509.load_der_x509_certificate(der) if der else None
