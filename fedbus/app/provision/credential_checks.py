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

from fedbus.app.failures import Failure
from fedbus.app.finding import SET_CLOCK, Finding, Health
from fedbus.app.provision.certificates import all_in, name_of, read_certificate
from fedbus.app.provision.keys import Key, verify
from fedbus.contracts.credentials import NotCredentials, jwt_in, seed_in, user_in

SOON: Final = timedelta(days=30)
KNOCK_S: Final = 5.0
CREDENTIALS: Final = "credentials"
AUTHORITY: Final = "authority"
CERTIFICATE: Final = "certificate"
NEW_KIT: Final = "get a new kit: fedbus provision rotate NAME, on the machine that has the keys"


def examine_credentials(path: Path, now: datetime, *, fed: str = "", client: str = "") -> Finding:
    """Whether the credentials file can be what the broker wants, of that *client* of *fed* where it is said."""
    try:
        text = path.read_text()
        claims, seed = user_in(text), seed_in(text)
    except OSError as error:
        return _ill(f"{path}: {error.strerror}", "copy it from the kit again, for this user to read")
    except NotCredentials as error:
        return _ill(f"{path}: {error}", "copy it from the kit again")
    if claims.issued > now:
        return _ill(f"{claims.name}, of {claims.issued:%Y-%m-%d}, in the future of this clock", SET_CLOCK)
    if not _is_signed_by(jwt_in(text), claims.iss):
        return _ill(f"{claims.name}: the signature is wrong: damaged, or forged", NEW_KIT)
    if Key(seed).public != claims.sub:
        return _ill(f"{claims.name}: the key is not the one they are for", NEW_KIT)
    if fed and (mistake := claims.mistaken_for(fed, client)):
        return _ill(*mistake.split(": ", 1))
    if path.stat().st_mode & 0o077:
        found = f"{claims.name}: others on this machine can read them"
        return Finding(CREDENTIALS, Health.REMARK, found, f"chmod 600 {path}")
    return _until(CREDENTIALS, claims.name, claims.expires, now, NEW_KIT)


def _ill(found: str, advice: str) -> Finding:
    return Finding(CREDENTIALS, Health.ILL, found, advice)


def examine_authority(path: Path, now: datetime) -> Finding:
    """Whether the certificate authority can be believed now."""
    try:
        ca = read_certificate(path)
    except Failure as failure:
        return Finding(AUTHORITY, Health.ILL, str(failure), "copy ca.pem from the kit again")
    if ca.not_valid_before_utc > now:
        return Finding(AUTHORITY, Health.ILL, f"{name_of(ca.subject)} is {_from_the_future(ca)}", SET_CLOCK)
    return _until(AUTHORITY, name_of(ca.subject), ca.not_valid_after_utc, now, NEW_KIT)


async def examine_server(url: str, ca_path: Path | None, now: datetime) -> Finding | None:
    """The certificate that the bus at *url* shows, whether we would believe it or not; None where it shows none."""
    shown = await _shown_certificate(url)
    if shown is None:
        return None
    try:
        believed = await asyncio.to_thread(all_in, ca_path) if ca_path else []
    except Failure:  # which is a finding of its own
        believed = []
    signer = next((ca for ca in believed if _is_from(shown, ca)), believed[0] if believed else None)
    return judge_server(shown, signer, urlsplit(url).hostname or "", now)


def judge_server(shown: x509.Certificate, ca: x509.Certificate | None, host: str, now: datetime) -> Finding:
    """What we make of the certificate that is *shown* for *host*."""
    issuer, of_the_bus = name_of(shown.issuer), "that of the bus"
    if shown.not_valid_before_utc > now:
        return _ill_certificate(f"{of_the_bus} is {_from_the_future(shown)}", SET_CLOCK)
    if ca is not None and not _is_from(shown, ca):
        advice = "use the kit of that federation, or set FEDBUS_NATS_URL to ours"
        if name_of(ca.subject) == issuer:
            advice = "its authority was made anew: copy ca.pem from the server again"
        return _ill_certificate(
            f"{of_the_bus} is from {issuer!r}, and we believe {name_of(ca.subject)!r}", advice
        )
    if host not in (names := _names(shown)):
        advice = f"reach it by one of {', '.join(sorted(names))}, or give it this name: fedbus provision init --host"
        return _ill_certificate(f"{of_the_bus} is not for {host}", advice)
    renew = "fedbus provision rotate --tls, on the machine that has the keys"
    return _until(CERTIFICATE, f"{issuer} for the bus", shown.not_valid_after_utc, now, renew)


def _ill_certificate(found: str, advice: str) -> Finding:
    return Finding(CERTIFICATE, Health.ILL, found, advice)


def _from_the_future(certificate: x509.Certificate) -> str:
    return f"of {certificate.not_valid_before_utc:%Y-%m-%d}, in the future of this clock"


def _until(what: str, name: str, end: datetime | None, now: datetime, advice: str) -> Finding:
    if end is None:
        return Finding(what, Health.WELL, f"{name}, good until revoked")
    if end <= now:
        wrong_clock = f"or, if this clock is ahead: {SET_CLOCK}"
        return Finding(what, Health.ILL, f"{name}: expired on {end:%Y-%m-%d}", f"{advice}; {wrong_clock}")
    if end - now < SOON:
        return Finding(what, Health.REMARK, f"{name}, good until {end:%Y-%m-%d}: soon", advice)
    return Finding(what, Health.WELL, f"{name}, good until {end:%Y-%m-%d}")


def _is_signed_by(jwt: str, issuer: str) -> bool:
    said, _, signature = jwt.rpartition(".")
    try:
        raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    except ValueError:
        return False
    return verify(issuer, said.encode(), raw)


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
    return set(_spelled(names))


def _spelled(names: x509.SubjectAlternativeName) -> Iterator[str]:
    yield from names.get_values_for_type(x509.DNSName)
    yield from (str(address) for address in names.get_values_for_type(x509.IPAddress))


async def _shown_certificate(url: str) -> x509.Certificate | None:
    """Looked at, and believed in nothing: no word of ours is sent."""
    at = urlsplit(url)
    curious = ssl.create_default_context()
    curious.check_hostname, curious.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(KNOCK_S):
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
