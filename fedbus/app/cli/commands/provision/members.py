"""`fedbus provision init`, `client`, `user`, `site`, `certificate` and `list`: create a federation and its members."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.cli.commands.provision.common import (
    Days,
    Host,
    Out,
    PublicKey,
    TrustFolder,
    check_free,
    open_federation,
    print_kit_steps,
    print_site_steps,
    trust_folder,
)
from fedbus.app.provision.federation import Federation, check_client_name
from fedbus.app.provision.nats_config import ServerLocation
from fedbus.app.provision.registry import Member, MemberKind
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.contracts.identifiers import check_id
from fedbus.contracts.permissions import Role


def init(
    *,
    host: Host = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of nats-server.")] = 4222,
    url: Annotated[
        str, typer.Option(help="URL of nats-server for the clients.", show_default="tls://HOST:PORT")
    ] = "",
    monitor_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Monitoring port of nats-server, on its own machine only.")
    ] = 8222,
    at: Annotated[
        Path | None,
        typer.Option(help="Path of trust/nats on the machine of nats-server.", show_default="its path here"),
    ] = None,
    trust: TrustFolder = None,
) -> None:
    """Create a federation: operator, account, signing keys, server credentials, certificates, nats.conf."""
    settings = Settings.from_environment()
    hosts = host or ["localhost", "127.0.0.1"]
    federation = Federation.create(
        trust_folder(trust), settings.fed, hosts=hosts, port=port, url=url, monitor_port=monitor_port
    )
    if at is not None:
        federation.set_server_path(at)
    print(f"federation {federation.fed} is in {federation.folder}. Keep it secret, and keep a backup")
    print(f"start nats-server:  nats-server -c {federation.nats_folder / 'nats.conf'}")
    environment = (
        f"FEDBUS_NATS_URL={federation.registry.url} FEDBUS_FEDERATION={federation.fed} "
        f"FEDBUS_CA={federation.ca_path} FEDBUS_CREDS={federation.creds_path('server')}"
    )
    print(f"start the server:   {environment} fedbus server up")
    print(f"add a client:       fedbus provision client ID --trust {federation.folder}")
    print(f"add a user:         fedbus provision user NAME --trust {federation.folder}")


def client(
    id: Annotated[str, typer.Argument(help="The client's id.")],
    *,
    public_key: PublicKey = "",
    out: Out = None,
    days: Days = 365.0,
    trust: TrustFolder = None,
) -> None:
    """Create the credentials of a client, as a kit for FEDBUS_KIT.

    A running server needs no update.
    """
    name, federation = check_client_name(id), open_federation(trust)
    federation.registry.check_name_free(MemberKind.CLIENT, name)
    path = check_free(out or Path("kits") / name)
    federation.admit(name, public_key=public_key, days=days).write(path)
    print_kit_steps(name, path, f"fedbus client up {name}", needs_key=bool(public_key))


def user(
    name: Annotated[str, typer.Argument(help="The user's name.")],
    *,
    observer: Annotated[bool, typer.Option("--observer", help="Read-only access.")] = False,
    public_key: PublicKey = "",
    out: Out = None,
    days: Days = 365.0,
    trust: TrustFolder = None,
) -> None:
    """Create the credentials of a user of the command line, as a kit for FEDBUS_KIT."""
    user_name, federation = check_client_name(name), open_federation(trust)
    federation.registry.check_name_free(MemberKind.PERSON, user_name)
    path = check_free(out or Path("kits") / user_name)
    role = Role.OBSERVER if observer else Role.USER
    federation.admit_person(name, role, public_key=public_key, days=days).write(path)
    print_kit_steps(name, path, "fedbus clients ls", needs_key=bool(public_key))


def site(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    *,
    client: Annotated[list[str], typer.Option(help="A client of the site. Repeatable.")],
    task: Annotated[list[str], typer.Option(help="A task of the clients. Repeatable.")],
    host: Host = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the leaf node.")] = 4222,
    at: Annotated[
        Path | None, typer.Option(help="Path of the folder on the machine of the leaf node.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the files of the leaf node to this folder.", show_default="sites/NAME"),
    ] = None,
    days: Days = 365.0,
    trust: TrustFolder = None,
) -> None:
    """Create a leaf node for a site: its clients connect to it, and it connects to the federation."""
    site, federation = check_id("site", name), open_federation(trust)
    federation.registry.check_name_free(MemberKind.SITE, site)
    path = check_free(out or Path("sites") / site)
    location = ServerLocation(at or path.absolute(), port)
    federation.write_site(
        name, client, task, path, location, hosts=host or ["localhost", "127.0.0.1"], days=days
    )
    print_site_steps(name, path, federation)


def certificate(
    *,
    host: Annotated[list[str], typer.Option(help="Host name or IP address of the server. Repeatable.")],
    out: Annotated[Path, typer.Option(help="Write server.pem and server.key to this folder.")],
    trust: TrustFolder = None,
) -> None:
    """Create a certificate for another server of the federation: S3 or the dashboard."""
    federation, path = open_federation(trust), check_free(out)
    federation.issue_certificate(host, path / "server.pem", path / "server.key")
    print(f"server.pem and server.key for {', '.join(host)} are in {path}")


def list_(*, json: output.JsonOption = False, trust: TrustFolder = None) -> None:
    """List all clients, sites, users and roles, with the state of their credentials."""
    members = open_federation(trust).registry.members
    if json:
        facts = [(name, kind, one.status, one.model_dump(mode="json")) for kind, name, one in members]
        print_json(
            [{"name": name, "kind": kind, "standing": status, **rest} for name, kind, status, rest in facts]
        )
    else:
        rows = [_member_row(*one) for one in members]
        output.print_table(
            ("name", "kind", "state", "expires", "key"), rows, empty="no clients, sites or users yet"
        )


def _member_row(kind: MemberKind, name: str, one: Member) -> tuple[str, str, str, str, str]:
    until = f"{one.expires:%Y-%m-%d}" if one.expires else "never"
    return name, one.role or kind, one.status, until, one.public_key
