"""Parser of NATS credentials files, for error messages about them.

    -----BEGIN NATS USER JWT-----      the claims of the user, signed by the account
    -----BEGIN USER NKEY SEED-----     the private key, which never leaves the file

Nothing here verifies a signature: nats-server does. `fedbus.app.provision` creates credentials.
"""

import base64
import json
import re
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedbus.contracts.permissions import Role

_JWT = re.compile(r"-----BEGIN NATS USER JWT-----\s*(\S+)\s*------?END NATS USER JWT")
_SEED = re.compile(r"-----BEGIN USER NKEY SEED-----\s*(SU[A-Z2-7]+)\s*------?END USER NKEY SEED")


_FEDERATION = "federation:"
_ROLE = "role:"


def federation_tag(fed: str) -> str:
    """Return the tag in a user's claims that names its federation."""
    return f"{_FEDERATION}{fed}"


def role_tag(role: str) -> str:
    return f"{_ROLE}{role}"


class InvalidCredentials(ValueError):
    """A text is not a valid credentials file."""


class _NatsClaims(BaseModel):
    issuer_account: str = ""
    tags: tuple[str, ...] = ()


class UserClaims(BaseModel):
    """The claims of a NATS user, not verified."""

    model_config = ConfigDict(frozen=True)

    name: str
    sub: str
    """The public key of the user."""
    iss: str
    """The public key of the signer, which is one of the account's signing keys."""
    iat: int
    exp: int | None = None
    nats: _NatsClaims = Field(default_factory=_NatsClaims)

    @property
    def issued_at(self) -> datetime:
        return datetime.fromtimestamp(self.iat, UTC)

    @property
    def expires_at(self) -> datetime | None:
        return datetime.fromtimestamp(self.exp, UTC) if self.exp else None

    @property
    def federation(self) -> str:
        """The federation; empty in credentials of older fedbus versions."""
        return self._tag_value(_FEDERATION)

    @property
    def role(self) -> str:
        """The role; empty in credentials of older fedbus versions."""
        return self._tag_value(_ROLE)

    def _tag_value(self, prefix: str) -> str:
        return next((tag.removeprefix(prefix) for tag in self.nats.tags if tag.startswith(prefix)), "")

    def mismatch(self, fed: str, client: str) -> str:
        """Describe why they cannot be used in *fed* as *client*; empty if they can.

        An empty *client* means an agent that belongs to no client.
        """
        is_device = self.role == Role.DEVICE
        other_federation = bool(self.federation) and self.federation != fed
        other_client = bool(self.role) and (self.name if is_device else "") != client
        if not (other_federation or other_client):
            return ""
        alternatives = [f"FEDBUS_FEDERATION={self.federation}"] if other_federation else []
        if other_client and is_device:
            alternatives.append(f"the client {self.name}" if client else f"FEDBUS_CLIENT={self.name}")
        owner = f"client {self.name}" if is_device else self.name
        process = f"client {client} of federation {fed}" if client else f"federation {fed}"
        if is_device and not client:
            process += " without a client"
        return (
            f"these are the credentials of {owner} of federation {self.federation or fed}, but this is "
            f"{process}: set FEDBUS_KIT or FEDBUS_CREDS to its own{', or use ' if alternatives else ''}"
            f"{' and '.join(alternatives)}"
        )

    def validity_problem(self, now: datetime) -> str:
        """Describe why they are not valid at *now*, and what to do; empty if they are valid."""
        if self.expires_at and self.expires_at <= now:
            return (
                f"the credentials of {self.name} expired on {self.expires_at:%Y-%m-%d %H:%M} UTC: "
                "get a new kit (fedbus provision rotate NAME, on the machine that has the keys)"
            )
        if self.issued_at > now:
            return (
                f"the credentials of {self.name} were issued on {self.issued_at:%Y-%m-%d %H:%M} UTC, which is after "
                f"{now:%Y-%m-%d %H:%M} UTC, the time of this machine: set its clock"
            )
        return ""


def extract_jwt(text: str) -> str:
    """Return the JWT in a credentials file; raises InvalidCredentials."""
    if (found := _JWT.search(text)) is None:
        raise InvalidCredentials("the file contains no NATS user JWT")
    return found[1]


def extract_seed(text: str) -> str:
    """Return the secret seed in a credentials file; raises InvalidCredentials."""
    if (found := _SEED.search(text)) is None:
        raise InvalidCredentials(
            "the file contains no key: create one on the device with `fedbus provision key`"
        )
    return found[1]


def parse_user(text: str) -> UserClaims:
    """Return the claims in a credentials file; raises InvalidCredentials."""
    try:
        return UserClaims.model_validate(decode_claims(extract_jwt(text)))
    except ValidationError as error:
        raise InvalidCredentials(
            f"the JWT is not that of a NATS user: {error.errors(include_url=False)[0]['msg']}"
        ) from None


def decode_claims(jwt: str) -> dict[str, Any]:
    """Return the claims of a JWT, not verified; raises InvalidCredentials."""
    try:
        _, claims, _ = jwt.split(".")
        found = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    except ValueError:
        raise InvalidCredentials("the JWT is corrupt") from None
    if not isinstance(found, dict):
        raise InvalidCredentials("the JWT is corrupt")
    return found
