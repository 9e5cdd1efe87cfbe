"""The folder with the keys of a federation, and all changes of its members.

    trust/federation.json   members and revocations
    trust/keys/             operator, account and system key, and one signing key for each role: secret
    trust/tls/              CA certificate and key, server certificate and key
    trust/creds/            credentials of server-side agents, the dashboard, users and the system account
    trust/nats/             the files for the machine of nats-server: nats.conf and tls/

A change is saved here first and then pushed to the running nats-server. If the push fails, the next
`fedbus provision push`, or a restart of nats-server with the new configuration, applies the change.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.provision import certificates, jwt_claims, nats_config
from fedbus.app.provision.hosts import check_host, check_url
from fedbus.app.provision.keys import Key, KeyType, check_public_key
from fedbus.app.provision.kit import Kit, pending_credentials, write_file
from fedbus.app.provision.registry import MONITOR_PORT, FederationRegistry, Member, MemberKind, Site
from fedbus.common.filesystem import SHARED_MODE, atomic_write
from fedbus.contracts.credentials import federation_tag, parse_user, role_tag
from fedbus.contracts.identifiers import FederationId, check_id, client_id, task_id
from fedbus.contracts.permissions import Role, permissions_for
from fedbus.contracts.subjects import RESERVED_OWNERS

REGISTRY_FILE: Final = "federation.json"
SYSTEM_NAME: Final = "system"
DEVICE_DAYS: Final = 365.0
AGENTS_DAYS: Final = 365.0
STORED_ROLES: Final = tuple(role for role in Role if role not in (Role.DEVICE, Role.SITE))
"""Roles whose credentials `begin` creates in the folder."""


class Federation:
    """The keys and members of one federation. Create it with `begin` or `open`."""

    def __init__(self, folder: Path, record: FederationRegistry) -> None:
        self.folder = folder
        self.registry = record

    @classmethod
    def create(
        cls,
        folder: Path,
        federation: FederationId,
        *,
        hosts: Sequence[str],
        port: int,
        url: str = "",
        monitor_port: int = MONITOR_PORT,
    ) -> "Federation":
        """Create a federation in *folder*.

        Raises:
            CliError: The folder has a federation already, or a host or the URL is invalid.

        """
        url = check_url(url or f"tls://{_url_host(check_host(hosts[0]))}:{port}")
        for host in hosts:
            check_host(host)
        if (folder / REGISTRY_FILE).exists():
            raise CliError(f"{folder} already has a federation. Its keys are not replaced", ExitCode.USAGE)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        record = FederationRegistry(
            federation=federation, hosts=list(hosts), port=port, url=url, monitor_port=monitor_port
        )
        federation_keys = cls(folder, record)
        federation_keys._make_keys()
        federation_keys.renew_server_certificate(new_authority=True)
        for role in STORED_ROLES:
            federation_keys._issue_to_role(role, AGENTS_DAYS)
        federation_keys._issue_system_credentials()
        federation_keys._save()
        return federation_keys

    @classmethod
    def open(cls, folder: Path) -> "Federation":
        """Open the federation in *folder*.

        Raises:
            CliError: There is none, or its registry is corrupt.

        """
        try:
            record = FederationRegistry.model_validate_json((folder / REGISTRY_FILE).read_text())
        except FileNotFoundError:
            raise CliError(
                f"no federation in {folder}. Create one with fedbus provision init", ExitCode.NOT_FOUND
            ) from None
        except ValueError as error:
            raise CliError(f"{folder / REGISTRY_FILE} is corrupt: {error}") from None
        found = cls(folder, record)
        found._adopt_existing_roles()
        return found

    @property
    def fed(self) -> FederationId:
        return FederationId(self.registry.federation)

    @property
    def ca_path(self) -> Path:
        return self.folder / "tls" / "ca.pem"

    @property
    def nats_folder(self) -> Path:
        """The folder to copy to the machine of nats-server."""
        return self.folder / "nats"

    def creds_path(self, role: Role | str) -> Path:
        return self.folder / "creds" / f"{role}.creds"

    # --- members -------------------------------------------------------------------------------------

    def admit(self, name: str, *, public_key: str = "", days: float = DEVICE_DAYS) -> Kit:
        """Add the client *name* and return its kit.

        Raises:
            BadId: *name* is not a client id.
            CliError: *name* is in use, or *public_key* is invalid.

        """
        client = check_client_name(name)
        self.registry.check_name_free(MemberKind.CLIENT, client)
        return self._admit_client(client, public_key, days)

    def reissue(
        self, name: str, *, public_key: str = "", days: float = DEVICE_DAYS, keep_old: bool = False
    ) -> Kit:
        """Issue a new key for the client or user *name*, and revoke the old one unless *keep_old*."""
        kind, member = self.registry.find(name)
        if not keep_old:
            self.revoke(name)
        earlier = member.all_keys if keep_old else ()
        if kind is MemberKind.PERSON:
            return self._admit_person(name, Role(member.role), public_key, days, earlier)
        return self._admit_client(name, public_key, days, earlier)

    def admit_person(
        self, name: str, role: Role = Role.USER, *, public_key: str = "", days: float = DEVICE_DAYS
    ) -> Kit:
        """Add a user, of role user or observer, and return the kit.

        Raises:
            BadId: *name* is not a valid id.
            CliError: *name* is in use, or *public_key* is invalid.

        """
        person = check_client_name(check_id("person", name))
        self.registry.check_name_free(MemberKind.PERSON, person)
        return self._admit_person(person, role, public_key, days)

    def renew_role(self, role: Role, *, days: float = AGENTS_DAYS, keep_old: bool = False) -> Path:
        """Issue new credentials for a server-side *role*, and revoke the old ones unless *keep_old*."""
        earlier = self.registry.roles[role].all_keys if keep_old and role in self.registry.roles else ()
        if not keep_old and role in self.registry.roles:
            self.revoke(role)
        self._issue_to_role(role, days, earlier)
        self._save()
        return self.creds_path(role)

    def revoke(self, name: str) -> None:
        """Revoke all keys of the member *name*.

        Raises:
            CliError: There is no such member.

        """
        _, member = self.registry.find(name)
        before = int(time.time()) + 1
        self.registry.revocations.update(dict.fromkeys(member.all_keys, before))
        if isinstance(member, Site):
            self.registry.system_revocations.update(dict.fromkeys(member.system_keys, before))
        member.revoked = member.revoked or datetime.now(UTC)
        self._save()

    def revoke_all_devices(self) -> None:
        """Replace the signing key of devices, which revokes every kit of a device."""
        Key.generate(KeyType.ACCOUNT).save(self._signing_path(Role.DEVICE))
        now = datetime.now(UTC)
        for member in self.registry.clients.values():
            member.revoked = member.revoked or now
        self._save()

    def write_site(
        self,
        name: str,
        clients: Sequence[str],
        tasks: Sequence[str],
        where: Path,
        place: nats_config.ServerLocation,
        *,
        hosts: Sequence[str],
        days: float,
    ) -> None:
        """Write the files of the leaf node of the site *name* into the folder *where*.

        The leaf node forwards the messages of these clients in these tasks only.

        Raises:
            BadId: *name*, a client or a task is not a valid id.
            CliError: *name* is in use, a client is not a member, or a host is invalid.

        """
        site = check_id("site", name)
        self.registry.check_name_free(MemberKind.SITE, site)
        if not clients or not tasks:
            raise CliError(
                "a site needs clients and tasks. Name them with --client and --task", ExitCode.USAGE
            )
        record = Site(
            public_key="",
            issued=datetime.now(UTC),
            clients=tuple(self._check_known_client(client) for client in clients),
            tasks=tuple(task_id(task) for task in tasks),
            hosts=tuple(check_host(host) for host in hosts),
            directory=str(place.directory),
            port=place.port,
            listen=place.listen,
        )
        self._write_site(site, record, where, days)

    def renew_site(
        self, name: str, where: Path, *, days: float = DEVICE_DAYS, keep_old: bool = False
    ) -> Site:
        """Write the files of the site *name* with new keys, and revoke the old ones unless *keep_old*.

        Raises:
            CliError: The registry does not have the settings of the site.

        """
        site = self.registry.sites[name]
        if not site.tasks:
            raise CliError(
                f"the registry has no settings of site {name}. Run fedbus provision revoke {name}, then site {name}",
                ExitCode.USAGE,
            )
        if not keep_old:
            self.revoke(name)
        old_keys = {"earlier_keys": site.all_keys} if keep_old else {"earlier_keys": (), "system_keys": ()}
        renewed = site.model_copy(update=old_keys | {"revoked": None, "issued": datetime.now(UTC)})
        self._write_site(name, renewed, where, days)
        return renewed

    def _write_site(self, name: str, site: Site, where: Path, days: float) -> None:
        key, system_key, expires = Key.generate(KeyType.USER), Key.generate(KeyType.USER), _expiry(days)
        carried = (*(f"client:{client}" for client in site.clients), *(f"task:{task}" for task in site.tasks))
        jwt = self._sign_user(Role.SITE, key.public, name, expires, carried)
        system_jwt = jwt_claims.system_user_jwt(
            self._system,
            system_key.public,
            f"site-{name}",
            nats_config.LEAF_PERMISSIONS,
            expires=_timestamp(expires),
        )
        site.public_key, site.expires = key.public, expires
        site.system_keys = (system_key.public, *site.system_keys)
        self.registry.sites[name] = site
        self._save()
        place = nats_config.ServerLocation(Path(site.directory), site.port, listen=site.listen)
        hub = f"tls://{_url_host(self.registry.hosts[0])}:{nats_config.leaf_port(self.registry.port)}"
        files = {
            "site.creds": key.render_credentials(jwt),
            "system.creds": system_key.render_credentials(system_jwt),
            "ca.pem": self.ca_path.read_text(),
            "leaf.conf": nats_config.render_leaf_config(name, place, self.server_claims(), url=hub),
        }
        for file, text in files.items():
            write_file(where / file, text)
        self.issue_certificate(site.hosts, where / "server.pem", where / "server.key")

    def _check_known_client(self, name: str) -> str:
        client = check_client_name(name)
        if client not in self.registry.clients:
            raise CliError(
                f"client {client} is not a member. Run fedbus provision client {client} first",
                ExitCode.NOT_FOUND,
            )
        return client

    def _admit_client(self, client: str, public_key: str, days: float, earlier: tuple[str, ...] = ()) -> Kit:
        member, creds = self._issue(Role.DEVICE, client, public_key, days, earlier)
        self.registry.clients[client] = member
        self._save()
        return self._make_kit(creds, {"FEDBUS_CLIENT": client})

    def _admit_person(
        self, name: str, role: Role, public_key: str, days: float, earlier: tuple[str, ...] = ()
    ) -> Kit:
        member, creds = self._issue(role, name, public_key, days, earlier)
        member.role = role
        self.registry.people[name] = member
        self._save()
        return self._make_kit(creds, {})

    def _make_kit(self, creds: str, settings: dict[str, str]) -> Kit:
        return Kit(
            creds=creds,
            ca=self.ca_path.read_text(),
            settings={
                "FEDBUS_NATS_URL": self.registry.url,
                "FEDBUS_FEDERATION": self.registry.federation,
                **settings,
            },
            allowed_signers=self._read_optional("allowed_signers"),
            trusted_keys=self._read_optional("trusted_keys"),
        )

    def _issue(
        self, role: Role, name: str, public_key: str, days: float, earlier: tuple[str, ...]
    ) -> tuple[Member, str]:
        """Issue credentials. With a *public_key*, they lack the private key, which the device has."""
        key = None if public_key else Key.generate(KeyType.USER)
        public = key.public if key else check_public_key(public_key)
        expires = _expiry(days)
        jwt = self._sign_user(role, public, name, expires)
        self.registry.revocations.pop(public, None)
        member = Member(public_key=public, issued=datetime.now(UTC), expires=expires, earlier_keys=earlier)
        return member, key.render_credentials(jwt) if key else pending_credentials(jwt)

    def _sign_user(
        self, role: Role, public: str, name: str, expires: datetime | None, tags: tuple[str, ...] = ()
    ) -> str:
        """Sign a user JWT, tagged with the federation and the role, so that a wrong use can be reported."""
        return jwt_claims.user_jwt(
            self._signing_key(role),
            self._account.public,
            public,
            name,
            tags=(federation_tag(self.fed), role_tag(role), *tags),
            expires=_timestamp(expires),
        )

    # --- files and claims for servers ------------------------------------------------------------------

    def account_jwt(self) -> str:
        """Sign the current claims of the federation's account."""
        roles = {role: (self._signing_key(role).public, permissions_for(self.fed, role)) for role in Role}
        return jwt_claims.account_jwt(
            self._operator, self._account.public, f"fedbus-{self.fed}", roles, self.registry.revocations
        )

    def system_jwt(self) -> str:
        """Sign the current claims of the system account."""
        return jwt_claims.system_account_jwt(
            self._operator, self._system.public, self.registry.system_revocations
        )

    def certificate_host(self, url: str) -> str:
        """Return the host of *url* if the server certificate has it, else the first host of the certificate."""
        host = urlsplit(url).hostname or ""
        return host if host in self.registry.hosts else self.registry.hosts[0]

    def account_jwts(self) -> tuple[str, str]:
        """Return the claims to push to a running server."""
        return self.account_jwt(), self.system_jwt()

    def server_claims(self) -> nats_config.ServerClaims:
        operator, system = self._operator, self._system
        return nats_config.ServerClaims(
            operator=jwt_claims.operator_jwt(operator, system_account=system.public),
            system=system.public,
            system_jwt=self.system_jwt(),
            account=self._account.public,
            account_jwt=self.account_jwt(),
        )

    def write_server_files(self, place: nats_config.ServerLocation | None = None) -> Path:
        """Write the files for the machine of nats-server, which has them at *place*; returns nats.conf."""
        record = self.registry
        place = place or nats_config.ServerLocation(
            Path(record.at or self.nats_folder), record.port, monitor_port=record.monitor_port
        )
        for name in ("server.pem", "server.key"):
            write_file(self.nats_folder / "tls" / name, (self.folder / "tls" / name).read_text())
        config = self.nats_folder / "nats.conf"
        config.write_text(nats_config.render_hub_config(f"fedbus-{self.fed}", place, self.server_claims()))
        return config

    def set_server_path(self, place: Path) -> None:
        """Record that the machine of nats-server has the folder nats/ at *place*."""
        self.registry.at = str(place)
        self._save()

    def renew_server_certificate(self, *, new_authority: bool = False) -> None:
        """Issue a new server certificate. With *new_authority*, every kit needs the new ca.pem.

        The new ca.pem has the previous CA too, so that kits and servers can be updated one after the other.
        """
        tls = self.folder / "tls"
        if new_authority:
            before = certificates.read_first_pem(self.ca_path) if self.ca_path.exists() else ""
            certificates.make_authority(self.fed, self.ca_path, tls / "ca.key")
            self.ca_path.write_text(self.ca_path.read_text() + before)
        self.issue_certificate(self.registry.hosts, tls / "server.pem", tls / "server.key")

    def issue_certificate(self, hosts: Sequence[str], certificate: Path, key: Path) -> None:
        """Issue a certificate for a server of the federation: a leaf node, S3 or the dashboard."""
        authority_key = self.folder / "tls" / "ca.key"
        certificates.make_server_certificate(self.ca_path, authority_key, hosts, certificate, key)

    # --- keys -------------------------------------------------------------------------------------------

    @property
    def _operator(self) -> Key:
        return Key.load(self.folder / "keys" / "operator.nk")

    @property
    def _account(self) -> Key:
        return Key.load(self.folder / "keys" / "account.nk")

    @property
    def _system(self) -> Key:
        return Key.load(self.folder / "keys" / "system.nk")

    def _signing_path(self, role: Role) -> Path:
        return self.folder / "keys" / "signing" / f"{role}.nk"

    def _signing_key(self, role: Role) -> Key:
        return Key.load(self._signing_path(role))

    def _make_keys(self) -> None:
        keys = self.folder / "keys"
        Key.generate(KeyType.OPERATOR).save(keys / "operator.nk")
        Key.generate(KeyType.ACCOUNT).save(keys / "account.nk")
        Key.generate(KeyType.ACCOUNT).save(keys / "system.nk")
        for role in Role:
            Key.generate(KeyType.ACCOUNT).save(self._signing_path(role))

    def _issue_to_role(self, role: Role, days: float, earlier: tuple[str, ...] = ()) -> None:
        member, creds = self._issue(role, role, "", days, earlier)
        self.registry.roles[role] = member
        write_file(self.creds_path(role), creds)

    def _issue_system_credentials(self) -> None:
        key = Key.generate(KeyType.USER)
        write_file(
            self.creds_path(SYSTEM_NAME),
            key.render_credentials(jwt_claims.system_user_jwt(self._system, key.public, SYSTEM_NAME)),
        )

    def _adopt_existing_roles(self) -> None:
        """Register the roles of a folder from before the registry had roles."""
        for role in STORED_ROLES:
            if role not in self.registry.roles and self.creds_path(role).exists():
                found = parse_user(self.creds_path(role).read_text())
                self.registry.roles[role] = Member(
                    public_key=found.sub, issued=found.issued_at, expires=found.expires_at
                )

    # --- the registry -------------------------------------------------------------------------------------

    def _save(self) -> None:
        atomic_write(self.folder / REGISTRY_FILE, self.registry.model_dump_json(indent=2), mode=SHARED_MODE)
        self.write_server_files()

    def _read_optional(self, name: str) -> str:
        """Read a file that every kit gets: allowed_signers or trusted_keys; empty if there is none."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""


def check_client_name(name: str) -> str:
    """Return *name* if it is valid for a client.

    Raises:
        BadId: It is not a valid id.
        CliError: The name is reserved.

    """
    client = client_id(name)
    if client in RESERVED_OWNERS:
        raise CliError(
            f"{client} is reserved and cannot be the name of a client. Choose another name", ExitCode.USAGE
        )
    return client


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _expiry(days: float) -> datetime | None:
    return datetime.now(UTC) + timedelta(days=days) if days else None


def _timestamp(moment: datetime | None) -> int | None:
    return int(moment.timestamp()) if moment else None
