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
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the bus listens.")] = 4222,
    url: Annotated[str, typer.Option(help="How devices reach it.", show_default="tls://HOST:PORT")] = "",
    monitor_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Where the bus tells of itself, on its own machine only.")
    ] = 8222,
    at: Annotated[
        Path | None,
        typer.Option(
            help="Where trust/nats will be on the server's machine.", show_default="where it is here"
        ),
    ] = None,
    trust: TrustFolder = None,
) -> None:
    """Make a federation: operator, account, signing keys, server credentials, certificates, nats.conf."""
    settings = Settings.from_environment()
    hosts = host or ["localhost", "127.0.0.1"]
    made = Federation.begin(
        trust_folder(trust), settings.fed, hosts=hosts, port=port, url=url, monitor_port=monitor_port
    )
    if at is not None:
        made.set_server_path(at)
    print(f"federation {made.fed} is in {made.folder}: keep it safe, and a copy elsewhere")
    print(f"start the bus:      nats-server -c {made.nats / 'nats.conf'}")
    where = f"FEDBUS_NATS_URL={made.record.url} FEDBUS_FEDERATION={made.fed} FEDBUS_CA={made.ca}"
    print(f"the server's side:  {where} FEDBUS_CREDS={made.creds('server')} fedbus server up")
    print(f"a device:           fedbus provision client ID --trust {made.folder}")
    print(f"a person:           fedbus provision user NAME --trust {made.folder}")


def client(
    id: Annotated[str, typer.Argument(help="The client's id.")],
    *,
    public_key: PublicKey = "",
    out: Out = None,
    days: Days = 365.0,
    trust: TrustFolder = None,
) -> None:
    """Let a client in: its kit, for FEDBUS_KIT. The running server needs to know nothing of it."""
    name, federation = check_client_name(id), open_federation(trust)
    federation.record.check_free(MemberKind.CLIENT, name)
    where = check_free(out or Path("kits") / name)
    federation.admit(name, public_key=public_key, days=days).write(where)
    print_kit_steps(name, where, f"fedbus client up {name}", waits=bool(public_key))


def user(
    name: Annotated[str, typer.Argument(help="The person's name.")],
    *,
    observer: Annotated[
        bool, typer.Option("--observer", help="Who may look, and start and stop nothing.")
    ] = False,
    public_key: PublicKey = "",
    out: Out = None,
    days: Days = 365.0,
    trust: TrustFolder = None,
) -> None:
    """Let a person in who works at a terminal: credentials of his own, which can be revoked alone."""
    person, federation = check_client_name(name), open_federation(trust)
    federation.record.check_free(MemberKind.PERSON, person)
    where = check_free(out or Path("kits") / person)
    role = Role.OBSERVER if observer else Role.USER
    federation.admit_person(name, role, public_key=public_key, days=days).write(where)
    print_kit_steps(name, where, "fedbus clients ls", waits=bool(public_key))


def site(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    *,
    client: Annotated[list[str], typer.Option(help="A client that it carries; repeat for each.")],
    task: Annotated[list[str], typer.Option(help="A task that they take part in; repeat for each.")],
    host: Host = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the leaf node listens.")] = 4222,
    at: Annotated[Path | None, typer.Option(help="Where the folder will be on the leaf's machine.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where its folder goes.", show_default="sites/NAME")
    ] = None,
    days: Days = 365.0,
    trust: TrustFolder = None,
) -> None:
    """A leaf node for a site: its clients connect to it, and one connection goes out to the federation."""
    site, federation = check_id("site", name), open_federation(trust)
    federation.record.check_free(MemberKind.SITE, site)
    where = check_free(out or Path("sites") / site)
    place = ServerLocation(at or where.absolute(), port)
    federation.write_site(
        name, client, task, where, place, hosts=host or ["localhost", "127.0.0.1"], days=days
    )
    print_site_steps(name, where, federation)


def certificate(
    *,
    host: Annotated[
        list[str], typer.Option(help="A name or address that it is reached by; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="The folder that server.pem and server.key go to.")],
    trust: TrustFolder = None,
) -> None:
    """A certificate for another server of the federation: its S3, its dashboard."""
    federation, where = open_federation(trust), check_free(out)
    federation.issue_certificate(host, where / "server.pem", where / "server.key")
    print(f"server.pem and server.key for {', '.join(host)} are in {where}")


def list_(*, json: output.JsonOption = False, trust: TrustFolder = None) -> None:
    """Who was let in as what, until when, and who was put out."""
    members = open_federation(trust).record.members
    if json:
        facts = [(name, kind, one.standing, one.model_dump(mode="json")) for kind, name, one in members]
        print_json(
            [
                {"name": name, "kind": kind, "standing": standing, **rest}
                for name, kind, standing, rest in facts
            ]
        )
    else:
        rows = [_member_row(*one) for one in members]
        output.print_table(("name", "is a", "standing", "until", "key"), rows, empty="nobody yet")


def _member_row(kind: MemberKind, name: str, one: Member) -> tuple[str, str, str, str, str]:
    until = f"{one.expires:%Y-%m-%d}" if one.expires else "no end"
    return name, one.role or kind, one.standing, until, one.public_key
