"""What a connection needs beside an address, off the laptop: credentials, and whom to believe.

Both are files, so that nothing secret is ever in an environment, an argument or a log, and a
connection that comes back reads them anew: credentials that were renewed in place are used.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbus.bus.errors import InvalidCredentialsFile
from fedbus.contracts.credentials import InvalidCredentials, UserClaims, extract_seed, parse_user


@dataclass(frozen=True)
class BusAccess:
    """Neither: the bus of a laptop, which asks nobody who he is."""

    creds: Path | None = None
    """A NATS credentials file: a JWT that says who we are, and the key that proves it."""
    ca: Path | None = None
    """The certificate authority of the bus, the S3 and the dashboard; left out: those the system knows."""

    @property
    def confined(self) -> bool:
        """Whether the bus lets us do less than everything."""
        return self.creds is not None

    def check_use(self, fed: str, client: str) -> None:
        """That the credentials are those of that *client* (empty: of no client) of *fed*; raises AccessUnusable.

        The broker would let them in, and then forbid one thing after the other.
        """
        if self.creds is None:
            return
        claims = _read_credentials(self.creds)
        if mistake := claims.mismatch(fed, client):
            raise InvalidCredentialsFile(f"FEDBUS_CREDS: {self.creds}: {mistake}")

    def options(self) -> dict[str, Any]:
        """As nats-py has them; raises AccessUnusable."""
        options: dict[str, Any] = {}
        if self.creds is not None:
            _read_credentials(self.creds)
            options["user_credentials"] = str(self.creds)
        if self.ca is not None:
            options["tls"] = self.tls()
        return options

    def tls(self) -> ssl.SSLContext:
        """What a TLS client of any of our servers believes; raises AccessUnusable."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
        if self.ca is not None:
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
