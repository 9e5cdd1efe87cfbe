"""The registry of a federation: its members and revocations. It has no secrets."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, Field

from fedbus.app.failures import CliError, ExitCode

MONITOR_PORT: Final = 8222


class MemberKind(StrEnum):
    """The kind of a member. A name is used for one kind only."""

    CLIENT = "client"
    SITE = "site"
    PERSON = "person"
    ROLE = "role"


class Member(BaseModel):
    """A client, a site, a user, or a server-side role."""

    public_key: str
    issued: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    role: str = ""
    """Of a user: ``user`` or ``observer``."""
    earlier_keys: tuple[str, ...] = ()
    """Keys that stayed valid when a new one was issued (``--keep-old``)."""

    @property
    def status(self) -> str:
        if self.revoked:
            return "revoked"
        if self.expires and self.expires <= datetime.now(UTC):
            return "expired"
        return "in"

    @property
    def all_keys(self) -> tuple[str, ...]:
        """All keys to revoke with the member."""
        return (self.public_key, *self.earlier_keys)


class Site(Member):
    """A leaf node, with all that `Federation.renew_site` needs to write its files again."""

    clients: tuple[str, ...] = ()
    """The clients that connect to it."""
    tasks: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    directory: str = ""
    port: int = 4222
    listen: str = "0.0.0.0"  # noqa: S104 (with credentials and TLS)
    system_keys: tuple[str, ...] = ()
    """Keys in the system account; empty for a site from before leaf nodes received revocations."""


class FederationRegistry(BaseModel):
    """The contents of ``federation.json``."""

    federation: str
    hosts: list[str]
    port: int
    url: str
    at: str = ""
    """Path of the folder nats/ on the server's machine; empty: as on this machine."""
    monitor_port: int = MONITOR_PORT
    clients: dict[str, Member] = Field(default_factory=dict)
    sites: dict[str, Site] = Field(default_factory=dict)
    people: dict[str, Member] = Field(default_factory=dict)
    roles: dict[str, Member] = Field(default_factory=dict)
    revocations: dict[str, int] = Field(default_factory=dict)
    """Public key → Unix time; JWTs of the key that were issued before are revoked."""
    system_revocations: dict[str, int] = Field(default_factory=dict)
    """The revocations in the system account, in which each site has a key."""

    @property
    def members(self) -> list[tuple[MemberKind, str, Member]]:
        """All members, with the revoked and expired ones."""
        by_kind: tuple[tuple[MemberKind, dict[str, Member] | dict[str, Site]], ...] = (
            (MemberKind.CLIENT, self.clients),
            (MemberKind.SITE, self.sites),
            (MemberKind.PERSON, self.people),
            (MemberKind.ROLE, self.roles),
        )
        return [(kind, name, member) for kind, members in by_kind for name, member in members.items()]

    def find(self, name: str) -> tuple[MemberKind, Member]:
        """Find the member *name*.

        Raises:
            CliError: There is none.

        """
        for kind, member_name, member in self.members:
            if member_name == name:
                return kind, member
        raise CliError(f"no member {name}. See fedbus provision list", ExitCode.NOT_FOUND)

    def check_name_free(self, kind: MemberKind, name: str) -> None:
        """Check that *name* can be given to a member of *kind*.

        Raises:
            CliError: *name* is a valid member, or belongs to a member of another kind.

        """
        for other, member_name, member in self.members:
            if member_name == name and other is not kind:
                raise CliError(
                    f"{name} is already the name of a {other}. Choose another name", ExitCode.USAGE
                )
            if member_name == name and member.status == "in":
                raise CliError(
                    f"{kind} {name} is already a member. For a new key, run fedbus provision rotate {name}",
                    ExitCode.USAGE,
                )

    def sites_of(self, client: str) -> dict[str, Site]:
        """Return the sites to whose leaf node *client* connects."""
        return {
            name: site for name, site in self.sites.items() if client in site.clients and not site.revoked
        }
