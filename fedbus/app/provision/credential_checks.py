"""What is wrong with the files that say who we are and whom we believe, and with the server's: in plain words.

Everything that can be seen from here is looked at: dates, signatures, what belongs to what, the certificate
that the server shows, whether it is one of ours, and both clocks. What only the server knows (who
was put out) is what is left when nothing else is wrong.
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
    """Whether the credentials file can be what the broker wants, of that *client* of *fed* where it is said."""
    try:
        text = path.read_text()
        claims, seed = parse_user(text), extract_seed(text)
    except OSError as error:
        return _credentials_error(
            f"{path}: {error.strerror}", "copy it from the kit again, for this user to read"
        )
    except InvalidCredentials as error:
        return _credentials_error(f"{path}: {error}", "copy it from the kit again")
    if claims.issued > now:
        return _credentials_error(
            f"{claims.name}, of {claims.issued:%Y-%m-%d}, in the future of this clock", SET_CLOCK_ADVICE
        )
    if not _is_signed_by(extract_jwt(text), claims.iss):
        return _credentials_error(
            f"{claims.name}: the signature is wrong: damaged, or forged", NEW_KIT_ADVICE
        )
    if Key(seed).public != claims.sub:
        return _credentials_error(f"{claims.name}: the key is not the one they are for", NEW_KIT_ADVICE)
    if fed and (mistake := claims.mismatch(fed, client)):
        return _credentials_error(*mistake.split(": ", 1))
    if path.stat().st_mode & 0o077:
        found = f"{claims.name}: others on this machine can read them"
        return DoctorFinding(CREDENTIALS, Severity.REMARK, found, f"chmod 600 {path}")
    return _check_expiry(CREDENTIALS, claims.name, claims.expires, now, NEW_KIT_ADVICE)


def _credentials_error(found: str, advice: str) -> DoctorFinding:
    return DoctorFinding(CREDENTIALS, Severity.ILL, found, advice)


def check_authority(path: Path, now: datetime) -> DoctorFinding:
    """Whether the certificate authority can be believed now."""
    try:
        ca = read_certificate(path)
    except CliError as failure:
        return DoctorFinding(AUTHORITY, Severity.ILL, str(failure), "copy ca.pem from the kit again")
    if ca.not_valid_before_utc > now:
        return DoctorFinding(
            AUTHORITY, Severity.ILL, f"{common_name_of(ca.subject)} is {_future_date(ca)}", SET_CLOCK_ADVICE
        )
    return _check_expiry(AUTHORITY, common_name_of(ca.subject), ca.not_valid_after_utc, now, NEW_KIT_ADVICE)


async def check_server(url: str, ca_path: Path | None, now: datetime) -> DoctorFinding | None:
    """The certificate that the bus at *url* shows, whether we would believe it or not; None where it shows none."""
    shown = await _fetch_certificate(url)
    if shown is None:
        return None
    try:
        believed = await asyncio.to_thread(read_authorities, ca_path) if ca_path else []
    except CliError:  # which is a finding of its own
        believed = []
    signer = next((ca for ca in believed if _is_from(shown, ca)), believed[0] if believed else None)
    return check_server_certificate(shown, signer, urlsplit(url).hostname or "", now)


def check_server_certificate(
    shown: x509.Certificate, ca: x509.Certificate | None, host: str, now: datetime
) -> DoctorFinding:
    """What we make of the certificate that is *shown* for *host*."""
    issuer, of_the_bus = common_name_of(shown.issuer), "that of the bus"
    if shown.not_valid_before_utc > now:
        return _certificate_error(f"{of_the_bus} is {_future_date(shown)}", SET_CLOCK_ADVICE)
    if ca is not None and not _is_from(shown, ca):
        advice = "use the kit of that federation, or set FEDBUS_NATS_URL to ours"
        if common_name_of(ca.subject) == issuer:
            advice = "its authority was made anew: copy ca.pem from the server again"
        return _certificate_error(
            f"{of_the_bus} is from {issuer!r}, and we believe {common_name_of(ca.subject)!r}", advice
        )
    if host not in (names := _names(shown)):
        advice = f"reach it by one of {', '.join(sorted(names))}, or give it this name: fedbus provision init --host"
        return _certificate_error(f"{of_the_bus} is not for {host}", advice)
    renew = "fedbus provision rotate --tls, on the machine that has the keys"
    return _check_expiry(CERTIFICATE, f"{issuer} for the bus", shown.not_valid_after_utc, now, renew)


def _certificate_error(found: str, advice: str) -> DoctorFinding:
    return DoctorFinding(CERTIFICATE, Severity.ILL, found, advice)


def _future_date(certificate: x509.Certificate) -> str:
    return f"of {certificate.not_valid_before_utc:%Y-%m-%d}, in the future of this clock"


def _check_expiry(what: str, name: str, end: datetime | None, now: datetime, advice: str) -> DoctorFinding:
    if end is None:
        return DoctorFinding(what, Severity.WELL, f"{name}, good until revoked")
    if end <= now:
        wrong_clock = f"or, if this clock is ahead: {SET_CLOCK_ADVICE}"
        return DoctorFinding(
            what, Severity.ILL, f"{name}: expired on {end:%Y-%m-%d}", f"{advice}; {wrong_clock}"
        )
    if end - now < EXPIRY_WARNING:
        return DoctorFinding(what, Severity.REMARK, f"{name}, good until {end:%Y-%m-%d}: soon", advice)
    return DoctorFinding(what, Severity.WELL, f"{name}, good until {end:%Y-%m-%d}")


def _is_signed_by(jwt: str, issuer: str) -> bool:
    said, _, signature = jwt.rpartition(".")
    try:
        raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    except ValueError:
        return False
    return verify_signature(issuer, said.encode(), raw)


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
    """Looked at, and believed in nothing: no word of ours is sent."""
    at = urlsplit(url)
    curious = ssl.create_default_context()
    curious.check_hostname, curious.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(at.hostname, at.port or 4222)
            greeting = await reader.readline()
            if b'"tls_required":true' not in greeting:
                writer.close()
                return None
            await writer.start_tls(curious, server_hostname=at.hostname)
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
    except (OSError, TimeoutError):
        return None
    return x509.load_der_x509_certificate(shown) if shown else None
