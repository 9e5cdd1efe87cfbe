"""Validation of host names, IP addresses and URLs for certificates and kits."""

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.settings import SCHEMES

_LABEL: Final = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
MAX_HOST_LENGTH: Final = 253


def check_host(host: str) -> str:
    """Return *host* if a certificate can name it.

    Raises:
        CliError: It is neither a DNS name nor an IP address.

    """
    if _is_address(host) or (_NAME.fullmatch(host) and len(host) <= MAX_HOST_LENGTH):
        return host
    advice = "Use a name like bus.example.org, or an IP address; set the port with --port"
    try:
        ascii_form = host.encode("idna").decode()
    except UnicodeError:
        ascii_form = host
    if ascii_form != host and _NAME.fullmatch(ascii_form):
        advice = f"Use its ASCII form (IDNA): {ascii_form}"
    raise CliError(f"--host {host!r} is not a valid host name. {advice}", ExitCode.USAGE)


def check_url(url: str) -> str:
    """Return *url* if it is a valid URL of a nats-server.

    Raises:
        CliError: It is not.

    """
    try:
        parts = urlsplit(url)
        is_valid = url.startswith(SCHEMES) and (parts.port is None or parts.port > 0)
        is_valid = is_valid and (
            _is_address(parts.hostname or "") or _NAME.fullmatch(parts.hostname or "") is not None
        )
    except ValueError:
        is_valid = False
    if not is_valid:
        raise CliError(
            f"--url {url!r} is not the URL of a nats-server. Use the form tls://bus.example.org:4222",
            ExitCode.USAGE,
        )
    return url


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
