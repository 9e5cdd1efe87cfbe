"""`fedbus provision`: who belongs to a federation, and how they prove it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.app.provision.federation import Federation
    from fedbus.app.provision.registry import Member, MemberKind

app = typer.Typer(
    no_args_is_help=True, help="Keys, credentials and certificates: who belongs to a federation."
)

TrustFolder = Annotated[
    Path | None,
    typer.Option("--trust", help="The folder with the federation's keys.", show_default="FEDBUS_HOME/trust"),
]
Days = Annotated[
    float, typer.Option(min=0, help="How long the credentials are good; 0: until they are revoked.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Where the kit goes: a folder, or a file NAME.tar.", show_default="kits/ID"),
]
PublicKey = Annotated[
    str, typer.Option(help="The device's own public key (U…): then the secret one never leaves the device.")
]
NoPush = Annotated[bool, typer.Option("--no-push", help="Do not tell the running server; see: push.")]
KeepOld = Annotated[
    bool,
    typer.Option(
        "--keep-old",
        help="Leave the old key good until it expires or is revoked, so that nothing stands still.",
    ),
]
Url = Annotated[
    str, typer.Option(help="Where the server is reached from here.", show_default="what init was given")
]
Host = Annotated[
    list[str] | None, typer.Option(help="A name or address by which the server is reached; may be repeated.")
]


@app.command()
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
    from fedbus.app.provision.federation import Federation
    from fedbus.app.settings import Settings

    settings = Settings.from_environment()
    hosts = host or ["localhost", "127.0.0.1"]
    made = Federation.begin(
        _trust_folder(trust), settings.fed, hosts=hosts, port=port, url=url, monitor_port=monitor_port
    )
    if at is not None:
        made.set_server_path(at)
    print(f"federation {made.fed} is in {made.folder}: keep it safe, and a copy elsewhere")
    print(f"start the bus:      nats-server -c {made.nats / 'nats.conf'}")
    where = f"FEDBUS_NATS_URL={made.record.url} FEDBUS_FEDERATION={made.fed} FEDBUS_CA={made.ca}"
    print(f"the server's side:  {where} FEDBUS_CREDS={made.creds('server')} fedbus server up")
    print(f"a device:           fedbus provision client ID --trust {made.folder}")
    print(f"a person:           fedbus provision user NAME --trust {made.folder}")


@app.command()
def client(
    id: Annotated[str, typer.Argument(help="The client's id.")],
    *,
    public_key: PublicKey = "",
    out: Out = None,
    days: Days = 365.0,
    trust: TrustFolder = None,
) -> None:
    """Let a client in: its kit, for FEDBUS_KIT. The running server needs to know nothing of it."""
    from fedbus.app.provision.federation import check_client_name
    from fedbus.app.provision.registry import MemberKind

    name, federation = check_client_name(id), _open_federation(trust)
    federation.record.check_free(MemberKind.CLIENT, name)
    where = _check_free(out or Path("kits") / name)
    federation.admit(name, public_key=public_key, days=days).write(where)
    _print_kit_steps(name, where, f"fedbus client up {name}", waits=bool(public_key))


@app.command()
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
    from fedbus.app.provision.federation import check_client_name
    from fedbus.app.provision.registry import MemberKind
    from fedbus.contracts.permissions import Role

    person, federation = check_client_name(name), _open_federation(trust)
    federation.record.check_free(MemberKind.PERSON, person)
    where = _check_free(out or Path("kits") / person)
    role = Role.OBSERVER if observer else Role.USER
    federation.admit_person(name, role, public_key=public_key, days=days).write(where)
    _print_kit_steps(name, where, "fedbus clients ls", waits=bool(public_key))


@app.command()
def key(
    *,
    out: Annotated[Path, typer.Option(help="Where the secret key goes; it stays on this device.")] = Path(
        "device.nk"
    ),
) -> None:
    """On a device: make its own key, and print the public one, which is all that leaves it."""
    from fedbus.app.provision.keys import Key, KeyType

    made = Key.new(KeyType.USER)
    made.save(_check_free(out))
    print(made.public)


@app.command()
def complete(
    kit: Annotated[Path, typer.Argument(help="The kit's folder.")],
    *,
    key: Annotated[Path, typer.Option(help="The device's own secret key.")] = Path("device.nk"),
) -> None:
    """On a device: put its own key to the kit that was made for it."""
    from fedbus.app.provision.keys import Key
    from fedbus.app.provision.kit import complete_kit as completed

    print(f"the kit of {completed(kit, Key.read(key))} is complete: set FEDBUS_KIT={kit}")


@app.command()
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
    from fedbus.app.provision.nats_config import ServerLocation
    from fedbus.app.provision.registry import MemberKind
    from fedbus.contracts.identifiers import check_id

    site, federation = check_id("site", name), _open_federation(trust)
    federation.record.check_free(MemberKind.SITE, site)
    where = _check_free(out or Path("sites") / site)
    place = ServerLocation(at or where.absolute(), port)
    federation.write_site(
        name, client, task, where, place, hosts=host or ["localhost", "127.0.0.1"], days=days
    )
    _print_site_steps(name, where, federation)


@app.command()
def certificate(
    *,
    host: Annotated[
        list[str], typer.Option(help="A name or address that it is reached by; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="The folder that server.pem and server.key go to.")],
    trust: TrustFolder = None,
) -> None:
    """A certificate for another server of the federation: its S3, its dashboard."""
    federation, where = _open_federation(trust), _check_free(out)
    federation.issue_certificate(host, where / "server.pem", where / "server.key")
    print(f"server.pem and server.key for {', '.join(host)} are in {where}")


@app.command("list")
def list_(*, json: output.JsonOption = False, trust: TrustFolder = None) -> None:
    """Who was let in as what, until when, and who was put out."""
    members = _open_federation(trust).record.members
    if json:
        facts = [(name, kind, one.standing, one.model_dump(mode="json")) for kind, name, one in members]
        output.print_json(
            [
                {"name": name, "kind": kind, "standing": standing, **rest}
                for name, kind, standing, rest in facts
            ]
        )
    else:
        rows = [_member_row(*one) for one in members]
        output.print_table(("name", "is a", "standing", "until", "key"), rows, empty="nobody yet")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="A client, site, person or role, as list shows it.")],
    *,
    no_push: NoPush = False,
    url: Url = "",
    trust: TrustFolder = None,
) -> None:
    """Put somebody out: the credentials are worth nothing from now on, and the server drops who uses them."""
    federation = _open_federation(trust)
    federation.revoke(name)
    _print_affected_sites(federation, name)
    _push(federation, url, no_push=no_push)
    print(f"{name} is out")


@app.command()
def rotate(
    name: Annotated[
        str, typer.Argument(help="Whose key is made anew: a client, site, person or role, as list shows it.")
    ] = "",
    *,
    tls: Annotated[bool, typer.Option("--tls", help="The server's certificate.")] = False,
    ca: Annotated[
        bool,
        typer.Option("--ca", help="The authority, and the server's certificate: everybody needs its ca.pem."),
    ] = False,
    devices: Annotated[
        bool, typer.Option("--devices", help="What signs for devices: every kit that was given out is void.")
    ] = False,
    public_key: PublicKey = "",
    keep_old: KeepOld = False,
    out: Out = None,
    days: Days = 365.0,
    no_push: NoPush = False,
    url: Url = "",
    trust: TrustFolder = None,
) -> None:
    """Make something anew: one key, the server's certificate, the authority, or what signs for devices."""
    federation = _open_federation(trust)
    if [bool(name), tls, ca, devices].count(True) != 1:
        raise CliError(
            "say what is made anew: a name as list shows it, --tls, --ca or --devices", ExitCode.USAGE
        )
    if tls or ca:
        federation.renew_server_certificate(new_authority=ca)
        federation.write_server_files()
        _print_certificate_steps(federation, new_authority=ca)
        return
    if devices:
        federation.revoke_all_devices()
        _push(federation, url, no_push=no_push)
        print("every device is out until it has a new kit: fedbus provision client ID")
        return
    told = _rotate_member(federation, name, out, public_key=public_key, days=days, keep_old=keep_old)
    _push(federation, url, no_push=no_push)
    told()


def _rotate_member(
    federation: "Federation", name: str, out: Path | None, *, public_key: str, days: float, keep_old: bool
) -> Callable[[], None]:
    """Make the key of *name* anew; what tells of it when the server knows."""
    from fedbus.app.provision.registry import MemberKind
    from fedbus.contracts.permissions import Role

    kind, _ = federation.record.find(name)
    match kind:
        case MemberKind.ROLE:
            where = federation.renew_role(Role(name), days=days, keep_old=keep_old)
            return partial(print, f"the new credentials of {name} are {where}: bring them to where it runs")
        case MemberKind.SITE:
            where = out or Path("sites") / name
            federation.renew_site(name, where, days=days, keep_old=keep_old)
            return partial(_print_site_steps, name, where, federation)
        case MemberKind.CLIENT | MemberKind.PERSON:
            where = _check_free_or_kit(out or Path("kits") / name)
            kit = federation.reissue(name, public_key=public_key, days=days, keep_old=keep_old)
            kit.write(where, anew=True)
            use = f"fedbus client up {name}" if kind is MemberKind.CLIENT else "fedbus clients ls"
            return partial(_print_kit_steps, name, where, use, waits=bool(public_key))


@app.command()
def push(*, url: Url = "", trust: TrustFolder = None) -> None:
    """Tell the running server who belongs to the federation."""
    _push(_open_federation(trust), url, no_push=False)
    print("the server knows")


# --- what they share --------------------------------------------------------------------------------


def _trust_folder(given: Path | None) -> Path:
    from fedbus.app.settings import Settings

    return (given or Settings.from_environment().home / "trust").absolute()


def _open_federation(given: Path | None) -> "Federation":
    from fedbus.app.provision.federation import Federation

    return Federation.open(_trust_folder(given))


def _check_free(path: Path) -> Path:
    if path.exists():
        raise CliError(
            f"{path} is there already: move it away, or name another place with --out", ExitCode.USAGE
        )
    return path


def _check_free_or_kit(path: Path) -> Path:
    """Where a kit is made anew: the old one there is worth nothing."""
    from fedbus.app.provision.kit import is_kit

    return path if is_kit(path) else _check_free(path)


def _push(federation: "Federation", url: str, *, no_push: bool) -> None:
    """What cannot be told now is not lost: it is written, and said to be."""
    from fedbus.app.bus_session import run_async
    from fedbus.app.provision.hosts import check_url
    from fedbus.app.terminal.progress_bar import progress_bar
    from fedbus.bus.account_admin import push_account_jwts
    from fedbus.bus.credentials import BusAccess
    from fedbus.bus.errors import BusError

    if no_push:
        return
    system = BusAccess(federation.creds("system"), federation.ca)
    at = check_url(url) if url else federation.record.url
    try:
        with progress_bar(f"telling the server at {at}"):
            run_async(
                push_account_jwts(at, system, federation.account_jwts(), host=federation.certificate_host(at))
            )
    except BusError as error:
        again = "fedbus provision push, with --url where it is reached by another address from here"
        raise CliError(
            f"it is written, but the server does not know yet: {error} Then: {again}", ExitCode.UNREACHABLE
        ) from None


def _print_kit_steps(name: str, where: Path, use: str, *, waits: bool) -> None:
    print(f"the kit of {name} is {where}: bring it there by a way that nobody else reads, for it is secret")
    folder = where.stem if where.suffix == ".tar" else where.name
    unpacked = f"tar xf {where.name} && " if where.suffix == ".tar" else ""
    there = "there, in the folder where you put it:"
    if waits:
        print(f"{there} {unpacked}fedbus provision complete {folder} --key device.nk")
    else:
        print(f"{there} {unpacked}FEDBUS_KIT={folder} {use}")


def _print_site_steps(name: str, where: Path, federation: "Federation") -> None:
    site = federation.record.sites[name]
    print(
        f"the folder of site {name} is {where}: bring it there by a way that nobody else reads, for it is secret"
    )
    print(f"start it there:  nats-server -c {Path(site.directory) / 'leaf.conf'}")
    client = site.clients[0]
    print(
        f"its devices:     FEDBUS_KIT={client} FEDBUS_NATS_URL=tls://{site.hosts[0]}:{site.port} "
        f"fedbus client up {client}"
    )


def _print_affected_sites(federation: "Federation", client: str) -> None:
    for name, site in federation.record.carriers(client).items():
        if site.system_keys:
            print(f"site {name} carries {client}: its leaf node hears of it by itself, when it is connected")
        else:
            print(
                f"site {name} carries {client}, and lets it in until it has a new folder: "
                f"fedbus provision rotate {name}, then bring it there and start the leaf node again"
            )


def _print_certificate_steps(federation: "Federation", *, new_authority: bool) -> None:
    if new_authority:
        print(f"new authority: first bring {federation.ca} into every kit, beside all credentials")
        for name in federation.record.sites:
            print(f"then the site:   fedbus provision rotate {name} --keep-old, and bring its folder there")
    print(
        f"new certificate in {federation.nats / 'tls'}: bring it to the server, then nats-server --signal reload"
    )


def _member_row(kind: "MemberKind", name: str, one: "Member") -> tuple[str, str, str, str, str]:
    until = f"{one.expires:%Y-%m-%d}" if one.expires else "no end"
    return name, one.role or kind, one.standing, until, one.public_key
