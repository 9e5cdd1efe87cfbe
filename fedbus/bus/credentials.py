"""Credentials and CA certificate of a connection, in a federation beyond one machine.

Both are files, so that no secret is in the environment, an argument or a log. A reconnect reads them again, so
that credentials can be renewed in place.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbus.bus.errors import InvalidCredentialsFile
from fedbus.contracts.credentials import InvalidCredentials, UserClaims, extract_seed, parse_user


@dataclass(frozen=True)
class BusAccess:
    """The credentials and the CA of a connection; without either, the NATS server requires no authentication."""

    creds: Path | None = None
    """A NATS credentials file: a user JWT and its private key."""
    ca: Path | None = None
    """The CA certificate of the bus, S3 and the dashboard; None: the CAs of the system."""
    proxied_host: str = ""
    """The host of the NATS server, whose certificate has this name, if the URL is that of a proxy to it. Then no other
    server of its cluster is used. Empty: there is no proxy."""

    @property
    def is_restricted(self) -> bool:
        """True if the NATS server restricts our permissions."""
        return self.creds is not None

    def check_use(self, fed: str, client: str) -> None:
        """Check that the credentials belong to *client* (empty: to no client) of *fed*.

        The NATS server would accept them and then deny every single operation.

        Raises:
            InvalidCredentialsFile: They belong to another identity, or the file is invalid.

        """
        if self.creds is None:
            return
        claims = _read_credentials(self.creds)
        if mistake := claims.mismatch(fed, client):
            raise InvalidCredentialsFile(f"FEDBUS_CREDS: {self.creds}: {mistake}")

    def connect_options(self) -> dict[str, Any]:
        """Return the connect options for nats-py; raises InvalidCredentialsFile."""
        options: dict[str, Any] = {}
        if self.creds is not None:
            _read_credentials(self.creds)
            options["user_credentials"] = str(self.creds)
        if self.ca is not None:
            options["tls"] = self.tls_context()
        if self.proxied_host:
            options["tls_hostname"] = self.proxied_host
        return options

    def tls_context(self) -> ssl.SSLContext:
        """Return the TLS context for clients of the federation's servers; raises InvalidCredentialsFile."""
        if self.ca is None:
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
        else:
            _check_readable(self.ca, "FEDBUS_CA")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError:
                raise InvalidCredentialsFile(
                    f"FEDBUS_CA: {self.ca} contains no certificate: copy ca.pem from the kit again"
                ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


ANONYMOUS = BusAccess()


def _read_credentials(path: Path) -> UserClaims:
    _check_readable(path, "FEDBUS_CREDS")
    try:
        text = path.read_text(errors="replace")
        extract_seed(text)
        return parse_user(text)
    except InvalidCredentials as error:
        raise InvalidCredentialsFile(f"FEDBUS_CREDS: {path} is invalid: {error}") from None


def _check_readable(path: Path, variable: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise InvalidCredentialsFile(
            f"{variable}: {path} cannot be read ({error.strerror}): copy it from the kit again"
        ) from None
