"""What is not secret about a federation: who was let in as what, and who was put out."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, Field

from fedbus.app.failures import CliError, ExitCode

MONITOR_PORT: Final = 8222


class MemberKind(StrEnum):
    """What somebody was let in as. A name stands for one of them only."""

    CLIENT = "client"
    SITE = "site"
    PERSON = "person"
    ROLE = "role"


class Member(BaseModel):
    """A client, a site, a person, or a role of the server side, that was let in."""

    public_key: str
    issued: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    role: str = ""
    """Of a person: ``user`` or ``observer``."""
    earlier_keys: tuple[str, ...] = ()
    """Those that were left good when it got another, so that nothing stood still."""

    @property
    def standing(self) -> str:
        if self.revoked:
            return "revoked"
        if self.expires and self.expires <= datetime.now(UTC):
            return "expired"
        return "in"

    @property
    def keys(self) -> tuple[str, ...]:
        """All that are to be revoked with it."""
        return (self.public_key, *self.earlier_keys)


class Site(Member):
    """A leaf node, with what it takes to write its folder anew."""

    clients: tuple[str, ...] = ()
    """Whom it carries."""
    tasks: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    directory: str = ""
    port: int = 4222
    listen: str = "0.0.0.0"  # noqa: S104 (with credentials and TLS)
    system_keys: tuple[str, ...] = ()
    """By which it is told who belongs to the federation; none: it was made before sites were told."""


class FederationRegistry(BaseModel):
    """All of it."""

    federation: str
    hosts: list[str]
    port: int
    url: str
    at: str = ""
    """Where the folder nats/ is on the server's machine, if not where it is here."""
    monitor_port: int = MONITOR_PORT
    clients: dict[str, Member] = Field(default_factory=dict)
    sites: dict[str, Site] = Field(default_factory=dict)
    people: dict[str, Member] = Field(default_factory=dict)
    roles: dict[str, Member] = Field(default_factory=dict)
    revocations: dict[str, int] = Field(default_factory=dict)
    """Public keys, and when they were put out: who was signed before that time."""
    system_revocations: dict[str, int] = Field(default_factory=dict)
    """The same in the broker's own account, of which sites have a key each."""

    @property
    def members(self) -> list[tuple[MemberKind, str, Member]]:
        """Everybody who was ever let in."""
        of_each: tuple[tuple[MemberKind, dict[str, Member] | dict[str, Site]], ...] = (
            (MemberKind.CLIENT, self.clients),
            (MemberKind.SITE, self.sites),
            (MemberKind.PERSON, self.people),
            (MemberKind.ROLE, self.roles),
        )
        return [(kind, name, member) for kind, some in of_each for name, member in some.items()]

    def find(self, name: str) -> tuple[MemberKind, Member]:
        """Who has this *name*; raises Failure."""
        for kind, called, member in self.members:
            if called == name:
                return kind, member
        raise CliError(f"nobody called {name} was ever let in: see fedbus provision list", ExitCode.NOT_FOUND)

    def check_free(self, kind: MemberKind, name: str) -> None:
        """Raises Failure where *name* is in, or stands for somebody of another kind."""
        for other, called, member in self.members:
            if called == name and other is not kind:
                raise CliError(f"{name} is the name of a {other} already: choose another", ExitCode.USAGE)
            if called == name and member.standing == "in":
                raise CliError(
                    f"{kind} {name} is in already: fedbus provision rotate {name} gives it another key",
                    ExitCode.USAGE,
                )

    def carriers(self, client: str) -> dict[str, Site]:
        """The sites whose leaf node carries *client*."""
        return {
            name: site for name, site in self.sites.items() if client in site.clients and not site.revoked
        }
