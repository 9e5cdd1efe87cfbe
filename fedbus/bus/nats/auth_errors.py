"""Explain why the NATS server rejected a connection, and what to do.

For security, the server sends only "Authorization Violation" without a cause. The cause is derived
from the local credentials file and the local clock.
"""

import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedbus.bus.errors import AccessDenied
from fedbus.contracts.credentials import InvalidCredentials, parse_user

DOCTOR_HINT: Final = "run `fedbus doctor` for details"
NEW_KIT_HINT: Final = "get a new kit: fedbus provision rotate NAME, on the machine that has the keys"

_PERMISSION_ERROR: Final = re.compile(
    r'permissions violation for (publish|subscription) to "([^"]+)"', re.IGNORECASE
)
_AUTH_ERRORS: Final = (
    (
        "user authentication revoked",
        "these credentials were revoked",
        f"If that was a mistake, {NEW_KIT_HINT}",
    ),
    (
        "user authentication expired",
        "these credentials have expired",
        f"G{NEW_KIT_HINT[1:]}",
    ),
    (
        "account authentication expired",
        "the account of this federation has expired or was replaced",
        f"G{NEW_KIT_HINT[1:]}",
    ),
)
_CERTIFICATE_ERRORS: Final = (
    (
        "certificate has expired",
        "its certificate has expired",
        "Renew it: fedbus provision rotate --tls; or this machine's clock is ahead",
    ),
    (
        "certificate is not yet valid",
        "its certificate is not valid yet by this machine's clock",
        "Set the clock",
    ),
    (
        "mismatch",
        "its certificate is for other names than this address",
        "Use a name that was given to: fedbus provision init --host",
    ),
)


@dataclass(frozen=True)
class PermissionViolation:
    action: str
    subject: str


def parse_permission_error(error: Exception) -> PermissionViolation | None:
    """Parse a permissions violation; None for any other *error*. The subject is in lower case."""
    found = _PERMISSION_ERROR.search(str(error))
    return PermissionViolation(found[1].lower(), found[2].lower()) if found else None


def access_denied_from(url: str, error: Exception, creds: Path | None) -> AccessDenied | None:
    """Explain an authentication or TLS *error* of the server at *url*; None for any other error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessDenied(url, *_explain_certificate_error(error))
    text = str(error).lower()
    for pattern, reason, advice in _AUTH_ERRORS:
        if pattern in text:
            return AccessDenied(url, reason, advice)
    if "authorization violation" in text or "authorization" in type(error).__name__.lower():
        return AccessDenied(url, *_explain_credentials_error(creds))
    if isinstance(error, ValueError) and creds is not None:
        return AccessDenied(url, f"{creds} contains no valid credentials", "Copy it from the kit again")
    return None


def _explain_certificate_error(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    text = (error.verify_message or str(error)).lower()
    for pattern, reason, advice in _CERTIFICATE_ERRORS:
        if pattern in text:
            return f"{reason} ({error.verify_message})", advice
    advice = "The kit may belong to another federation, or the address to another server"
    return (
        f"its certificate is not signed by the CA in FEDBUS_CA ({error.verify_message})",
        f"{advice}; {DOCTOR_HINT}",
    )


def _explain_credentials_error(creds: Path | None) -> tuple[str, str]:
    if creds is None:
        return (
            "the server requires credentials, and none are set",
            "Set FEDBUS_KIT or FEDBUS_CREDS to what came with your kit",
        )
    try:
        claims = parse_user(creds.read_text())
    except (OSError, InvalidCredentials) as error:
        return f"{creds} is invalid ({error})", "Copy it from the kit again"
    if problem := claims.validity_problem(datetime.now(UTC)):
        reason, _, advice = problem.partition(": ")
        return reason, f"{advice[0].upper()}{advice[1:]}"
    return (
        f"the credentials of {claims.name} are revoked, forged or from another federation",
        f"G{NEW_KIT_HINT[1:]}; {DOCTOR_HINT}",
    )
