"""What stands in a NATS credentials file, for whoever must say what is wrong with one.

    -----BEGIN NATS USER JWT-----      who he is, signed by the account
    -----BEGIN USER NKEY SEED-----     the key that proves it, which never leaves the file

Only read here: nothing is believed because of it. The broker checks the signature; how one is
made stands in `fedbus.app.provision`.
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
    """What says in a user's claims of which federation they are."""
    return f"{_FEDERATION}{fed}"


def role_tag(role: str) -> str:
    return f"{_ROLE}{role}"


class InvalidCredentials(ValueError):
    """The text is no credentials file."""


class _NatsClaims(BaseModel):
    issuer_account: str = ""
    tags: tuple[str, ...] = ()


class UserClaims(BaseModel):
    """Who somebody says he is."""

    model_config = ConfigDict(frozen=True)

    name: str
    sub: str
    """His public key."""
    iss: str
    """The key that signed it: one of the account's signing keys."""
    iat: int
    exp: int | None = None
    nats: _NatsClaims = Field(default_factory=_NatsClaims)

    @property
    def issued(self) -> datetime:
        return datetime.fromtimestamp(self.iat, UTC)

    @property
    def expires(self) -> datetime | None:
        return datetime.fromtimestamp(self.exp, UTC) if self.exp else None

    @property
    def federation(self) -> str:
        """Of which they are; empty where they were made before that was written into them."""
        return self._tag_value(_FEDERATION)

    @property
    def role(self) -> str:
        """What they are for; empty where they were made before that was written into them."""
        return self._tag_value(_ROLE)

    def _tag_value(self, prefix: str) -> str:
        return next((tag.removeprefix(prefix) for tag in self.nats.tags if tag.startswith(prefix)), "")

    def mismatch(self, fed: str, client: str) -> str:
        """What is wrong with using them in *fed*, as *client* or (empty) as no client; empty where nothing is."""
        of_device = self.role == Role.DEVICE
        other_federation = bool(self.federation) and self.federation != fed
        other_client = bool(self.role) and (self.name if of_device else "") != client
        if not (other_federation or other_client):
            return ""
        theirs = [f"FEDBUS_FEDERATION={self.federation}"] if other_federation else []
        if other_client and of_device:
            theirs.append(f"the client {self.name}" if client else f"FEDBUS_CLIENT={self.name}")
        whose = f"client {self.name}" if of_device else self.name
        here = f"client {client} of federation {fed}" if client else f"federation {fed}"
        if of_device and not client:
            here += " without a client"
        return (
            f"these are the credentials of {whose} of federation {self.federation or fed}, and this is "
            f"{here}: set FEDBUS_KIT or FEDBUS_CREDS to its own{', or use ' if theirs else ''}"
            f"{' and '.join(theirs)}"
        )

    def validity_problem(self, now: datetime) -> str:
        """What is wrong with it at this time, and what to do; empty where nothing is."""
        if self.expires and self.expires <= now:
            return (
                f"the credentials of {self.name} have expired on {self.expires:%Y-%m-%d %H:%M} UTC: "
                "get a new kit (fedbus provision rotate NAME, on the machine that has the keys)"
            )
        if self.issued > now:
            return (
                f"the credentials of {self.name} are of {self.issued:%Y-%m-%d %H:%M} UTC, and this clock "
                f"says {now:%Y-%m-%d %H:%M}: set the clock"
            )
        return ""


def extract_jwt(text: str) -> str:
    """The JWT in a credentials file; raises NotCredentials."""
    if (found := _JWT.search(text)) is None:
        raise InvalidCredentials("it holds no NATS user JWT")
    return found[1]


def extract_seed(text: str) -> str:
    """The seed in a credentials file, which is secret; raises NotCredentials."""
    if (found := _SEED.search(text)) is None:
        raise InvalidCredentials("it holds no key: `fedbus provision key` makes one on the device itself")
    return found[1]


def parse_user(text: str) -> UserClaims:
    """Whose credentials *text* holds; raises NotCredentials."""
    try:
        return UserClaims.model_validate(decode_claims(extract_jwt(text)))
    except ValidationError as error:
        raise InvalidCredentials(
            f"its JWT is no user's: {error.errors(include_url=False)[0]['msg']}"
        ) from None


def decode_claims(jwt: str) -> dict[str, Any]:
    """The claims of a JWT, unchecked; raises NotCredentials."""
    try:
        _, claims, _ = jwt.split(".")
        found = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    except ValueError:
        raise InvalidCredentials("its JWT is damaged") from None
    if not isinstance(found, dict):
        raise InvalidCredentials("its JWT is damaged")
    return found
