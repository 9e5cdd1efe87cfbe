"""Names and addresses by which a server is reached, as a certificate and a kit can have them."""

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
    """*host*, if it is an address or a name that a certificate can be for; raises Failure."""
    if _is_address(host) or (_NAME.fullmatch(host) and len(host) <= MAX_HOST_LENGTH):
        return host
    advice = "write a name like bus.example.org, or an address; for the port there is --port"
    try:
        ascii_form = host.encode("idna").decode()
    except UnicodeError:
        ascii_form = host
    if ascii_form != host and _NAME.fullmatch(ascii_form):
        advice = f"write it as the network does: {ascii_form}"
    raise CliError(f"--host {host!r} is no name that a certificate can be for: {advice}", ExitCode.USAGE)


def check_url(url: str) -> str:
    """*url*, if it is where a nats-server can be; raises Failure."""
    try:
        at = urlsplit(url)
        well = url.startswith(SCHEMES) and at.hostname is not None and (at.port is None or at.port > 0)
        well = well and (_is_address(at.hostname or "") or _NAME.fullmatch(at.hostname or "") is not None)
    except ValueError:
        well = False
    if not well:
        raise CliError(
            f"--url {url!r} is not the address of a nats-server: write tls://bus.example.org:4222",
            ExitCode.USAGE,
        )
    return url


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
