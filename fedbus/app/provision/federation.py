"""The folder that holds a federation's keys, and every change of who belongs to it.

    trust/federation.json   who was let in, and who was put out
    trust/keys/             operator, account, system and one signing key for each role: secret
    trust/tls/              the authority and its key, the server's certificate and its key
    trust/creds/            credentials of the server side's agents, the dashboard, people and the broker's own account
    trust/nats/             what the nats-server's machine needs, and nothing more: nats.conf and tls/

A change is written here first and then told to the running server; what could not be told is told by
the next `fedbus provision push`, or by the configuration when the server starts.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field

from fedbus.app.edge import Exit, Failure
from fedbus.app.provision import certificates, claims, server
from fedbus.app.provision.keys import Key, Of, check_public
from fedbus.app.provision.kit import Kit, waiting, write_file
from fedbus.contracts.identifiers import FederationId, check_id, client_id, task_id
from fedbus.contracts.permissions import Role, permissions
from fedbus.contracts.subjects import RESERVED

RECORD: Final = "federation.json"
SYSTEM: Final = "system"
DEVICE_DAYS: Final = 365
AGENTS_DAYS: Final = 365
GIVEN_OUT: Final = tuple(role for role in Role if role not in (Role.DEVICE, Role.SITE))
"""Roles whose credentials lie in the folder from the beginning."""


class Member(BaseModel):
    """A client, or a site, that was let in."""

    public_key: str
    issued: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    clients: tuple[str, ...] = ()
    """Of a site: whom it carries."""

    @property
    def standing(self) -> str:
        if self.revoked:
            return "revoked"
        if self.expires and self.expires <= datetime.now(UTC):
            return "expired"
        return "in"


class Record(BaseModel):
    """What is not secret about a federation."""

    federation: str
    hosts: list[str]
    port: int
    url: str
    at: str = ""
    """Where the folder nats/ is on the server's machine, if not where it is here."""
    clients: dict[str, Member] = Field(default_factory=dict)
    sites: dict[str, Member] = Field(default_factory=dict)
    revocations: dict[str, int] = Field(default_factory=dict)
    """Public keys, and when they were put out: who was signed before that time."""


class Federation:
    """One federation's keys. Make one with `begin` or `open`."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder = folder
        self.record = record

    @classmethod
    def begin(
        cls, folder: Path, federation: FederationId, *, hosts: Sequence[str], port: int, url: str = ""
    ) -> "Federation":
        """A new federation; raises Failure where the folder holds one."""
        if (folder / RECORD).exists():
            raise Failure(f"{folder} holds a federation already: its keys are not made anew", Exit.USAGE)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        record = Record(
            federation=federation, hosts=list(hosts), port=port, url=url or f"tls://{hosts[0]}:{port}"
        )
        begun = cls(folder, record)
        begun._make_keys()
        begun.renew_server_certificate(new_authority=True)
        begun._save()
        begun._issue_to_roles()
        return begun

    @classmethod
    def open(cls, folder: Path) -> "Federation":
        """The federation in *folder*; raises Failure."""
        try:
            record = Record.model_validate_json((folder / RECORD).read_text())
        except FileNotFoundError:
            raise Failure(
                f"no federation in {folder}: fedbus provision init makes one", Exit.NOT_FOUND
            ) from None
        except ValueError as error:
            raise Failure(f"{folder / RECORD} is damaged: {error}") from None
        return cls(folder, record)

    @property
    def fed(self) -> FederationId:
        return FederationId(self.record.federation)

    @property
    def ca(self) -> Path:
        return self.folder / "tls" / "ca.pem"

    @property
    def nats(self) -> Path:
        """What goes to the nats-server's machine."""
        return self.folder / "nats"

    def creds(self, role: Role | str) -> Path:
        return self.folder / "creds" / f"{role}.creds"

    # --- who is let in ------------------------------------------------------------------------------

    def admit(self, name: str, *, public_key: str = "", days: float = DEVICE_DAYS) -> Kit:
        """The kit of the client *name*; raises BadId and Failure."""
        client = check_client(name)
        known = self.record.clients.get(client)
        if known is not None and known.standing == "in":
            raise Failure(
                f"client {client} is in already: fedbus provision rotate {client} gives it another key",
                Exit.USAGE,
            )
        return self._let_in(client, public_key, days)

    def admit_anew(self, name: str, *, public_key: str = "", days: float = DEVICE_DAYS) -> Kit:
        """Another key for the client *name*; the old one is worth nothing from now on."""
        self.put_out(name)
        return self._let_in(name, public_key, days)

    def put_out(self, name: str) -> None:
        """The key of the client or site *name* is worth nothing from now on; raises Failure."""
        member = self.record.clients.get(name) or self.record.sites.get(name)
        if member is None:
            raise Failure(f"no client {name} was ever let in: see fedbus provision list", Exit.NOT_FOUND)
        now = datetime.now(UTC)
        self.record.revocations[member.public_key] = int(time.time()) + 1
        member.revoked = member.revoked or now
        self._save()

    def put_out_all_devices(self) -> None:
        """Another signing key for devices: every kit that was given out is worth nothing from now on."""
        Key.new(Of.ACCOUNT).save(self._signing_path(Role.DEVICE))
        now = datetime.now(UTC)
        for member in self.record.clients.values():
            member.revoked = member.revoked or now
        self._save()

    def admit_site(
        self, name: str, clients: Sequence[str], tasks: Sequence[str], *, days: float = DEVICE_DAYS
    ) -> dict[str, str]:
        """What the leaf node of the site *name* needs, by file name: for these clients in these tasks, no others."""
        site = check_id("site", name)
        carried = tuple(check_client(client) for client in clients)
        if not carried or not tasks:
            raise Failure("a site carries clients in tasks: name both, with --client and --task", Exit.USAGE)
        key, expires = Key.new(Of.USER), _expiry(days)
        jwt = claims.user(
            self._signing_key(Role.SITE),
            self._account.public,
            key.public,
            site,
            tags=(*(f"client:{client}" for client in carried), *(f"task:{task_id(task)}" for task in tasks)),
            expires=_stamp(expires),
        )
        self.record.sites[site] = Member(
            public_key=key.public, issued=datetime.now(UTC), expires=expires, clients=carried
        )
        self._save()
        return {"site.creds": key.credentials(jwt), "ca.pem": self.ca.read_text()}

    def _let_in(self, client: str, public_key: str, days: float) -> Kit:
        key = None if public_key else Key.new(Of.USER)
        public = key.public if key else check_public(public_key)
        expires = _expiry(days)
        jwt = claims.user(
            self._signing_key(Role.DEVICE), self._account.public, public, client, expires=_stamp(expires)
        )
        self.record.revocations.pop(public, None)
        self.record.clients[client] = Member(public_key=public, issued=datetime.now(UTC), expires=expires)
        self._save()
        return Kit(
            creds=key.credentials(jwt) if key else waiting(jwt),
            ca=self.ca.read_text(),
            settings={
                "FEDBUS_NATS_URL": self.record.url,
                "FEDBUS_FEDERATION": self.record.federation,
                "FEDBUS_CLIENT": client,
            },
            signers=self._text("allowed_signers"),
            trusted=self._text("trusted_keys"),
        )

    # --- what servers read ----------------------------------------------------------------------------

    def account_jwt(self) -> str:
        """The federation's account as it stands."""
        roles = {role: (self._signing_key(role).public, permissions(self.fed, role)) for role in Role}
        return claims.account(
            self._operator, self._account.public, f"fedbus-{self.fed}", roles, self.record.revocations
        )

    def claims(self) -> server.Claims:
        operator, system = self._operator, self._system
        return server.Claims(
            operator=claims.operator(operator, system_account=system.public),
            system=system.public,
            system_jwt=claims.system_account(operator, system.public),
            account=self._account.public,
            account_jwt=self.account_jwt(),
        )

    def write_server_files(self, place: server.Place | None = None) -> Path:
        """Everything that the nats-server's machine needs, for a server that will find it at *place*."""
        place = place or server.Place(Path(self.record.at or self.nats), self.record.port)
        for name in ("server.pem", "server.key"):
            write_file(self.nats / "tls" / name, (self.folder / "tls" / name).read_text())
        config = self.nats / "nats.conf"
        config.write_text(server.hub(f"fedbus-{self.fed}", place, self.claims()))
        return config

    def stand_at(self, place: Path) -> None:
        """The nats-server's machine has the folder nats/ at *place*."""
        self.record.at = str(place)
        self._save()

    def write_site(
        self,
        name: str,
        clients: Sequence[str],
        tasks: Sequence[str],
        where: Path,
        place: server.Place,
        *,
        hosts: Sequence[str],
        days: float,
    ) -> None:
        """Everything that the leaf node of the site *name* needs, into the folder *where*."""
        for file, text in self.admit_site(name, clients, tasks, days=days).items():
            write_file(where / file, text)
        self.certify(hosts, where / "server.pem", where / "server.key")
        hub = f"tls://{self.record.hosts[0]}:{server.leaf_port(self.record.port)}"
        (where / "leaf.conf").write_text(server.leaf(name, place, self.claims(), url=hub))

    def renew_server_certificate(self, *, new_authority: bool = False) -> None:
        """Another certificate for the servers; with a *new authority* every kit needs its ca.pem anew."""
        tls = self.folder / "tls"
        if new_authority:
            certificates.make_authority(self.fed, self.ca, tls / "ca.key")
        self.certify(self.record.hosts, tls / "server.pem", tls / "server.key")

    def certify(self, hosts: Sequence[str], certificate: Path, key: Path) -> None:
        """A certificate for a server of the federation: a leaf node, the S3, the dashboard."""
        authority_key = self.folder / "tls" / "ca.key"
        certificates.make_server_certificate(self.ca, authority_key, hosts, certificate, key)

    # --- keys -------------------------------------------------------------------------------------------

    @property
    def _operator(self) -> Key:
        return Key.read(self.folder / "keys" / "operator.nk")

    @property
    def _account(self) -> Key:
        return Key.read(self.folder / "keys" / "account.nk")

    @property
    def _system(self) -> Key:
        return Key.read(self.folder / "keys" / "system.nk")

    def _signing_path(self, role: Role) -> Path:
        return self.folder / "keys" / "signing" / f"{role}.nk"

    def _signing_key(self, role: Role) -> Key:
        return Key.read(self._signing_path(role))

    def _make_keys(self) -> None:
        keys = self.folder / "keys"
        Key.new(Of.OPERATOR).save(keys / "operator.nk")
        Key.new(Of.ACCOUNT).save(keys / "account.nk")
        Key.new(Of.ACCOUNT).save(keys / "system.nk")
        for role in Role:
            Key.new(Of.ACCOUNT).save(self._signing_path(role))

    def _issue_to_roles(self) -> None:
        expires = _stamp(_expiry(AGENTS_DAYS))
        for role in GIVEN_OUT:
            key = Key.new(Of.USER)
            jwt = claims.user(
                self._signing_key(role), self._account.public, key.public, str(role), expires=expires
            )
            write_file(self.creds(role), key.credentials(jwt))
        key, system = Key.new(Of.USER), self._system
        jwt = claims.user(system, system.public, key.public, SYSTEM, scoped=False)
        write_file(self.creds(SYSTEM), key.credentials(jwt))

    # --- the record ---------------------------------------------------------------------------------------

    def _save(self) -> None:
        part = self.folder / f"{RECORD}.part"
        part.write_text(self.record.model_dump_json(indent=2))
        part.replace(self.folder / RECORD)
        self.write_server_files()

    def _text(self, name: str) -> str:
        """What was put beside the keys for every kit: who signs commits, whose models are served."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""


def check_client(name: str) -> str:
    """*name*, if a client may be called so; raises BadId."""
    client = client_id(name)
    if client in RESERVED:
        raise Failure(f"no client can be called {client}: on the bus that name stands for others", Exit.USAGE)
    return client


def _expiry(days: float) -> datetime | None:
    return datetime.now(UTC) + timedelta(days=days) if days else None


def _stamp(moment: datetime | None) -> int | None:
    return int(moment.timestamp()) if moment else None
