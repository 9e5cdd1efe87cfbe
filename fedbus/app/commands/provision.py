"""`fedbus provision`: who belongs to a federation, and how they prove it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedbus.app import show
from fedbus.app.edge import Exit, Failure

if TYPE_CHECKING:
    from fedbus.app.provision.federation import Federation, Member

app = typer.Typer(
    no_args_is_help=True, help="Keys, credentials and certificates: who belongs to a federation."
)

Folder = Annotated[
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
Host = Annotated[
    list[str] | None, typer.Option(help="A name or address by which the server is reached; may be repeated.")
]


@app.command()
def init(
    *,
    host: Host = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the bus listens.")] = 4222,
    url: Annotated[str, typer.Option(help="How devices reach it.", show_default="tls://HOST:PORT")] = "",
    at: Annotated[
        Path | None,
        typer.Option(
            help="Where trust/nats will be on the server's machine.", show_default="where it is here"
        ),
    ] = None,
    trust: Folder = None,
) -> None:
    """Make a federation: operator, account, signing keys, server credentials, certificates, nats.conf."""
    from fedbus.app.provision.federation import Federation
    from fedbus.app.settings import Settings

    settings = Settings.from_environment()
    hosts = host or ["localhost", "127.0.0.1"]
    made = Federation.begin(_folder(trust), settings.fed, hosts=hosts, port=port, url=url)
    if at is not None:
        made.stand_at(at)
    print(f"federation {made.fed} is in {made.folder}: keep it safe, and a copy elsewhere")
    print(f"start the bus:      nats-server -c {made.nats / 'nats.conf'}")
    print(f"the server's side:  FEDBUS_CREDS={made.creds('server')} FEDBUS_CA={made.ca}")
    print(f"a device:           fedbus provision client ID --trust {made.folder}")


@app.command()
def client(
    id: Annotated[str, typer.Argument(help="The client's id.")],
    *,
    public_key: PublicKey = "",
    out: Out = None,
    days: Days = 365.0,
    trust: Folder = None,
) -> None:
    """Let a client in: its kit, for FEDBUS_KIT. The running server needs to know nothing of it."""
    from fedbus.app.provision.federation import check_client

    name, federation = check_client(id), _federation(trust)
    where = _free(out or Path("kits") / name)
    federation.admit(name, public_key=public_key, days=days).write(where)
    _tell_of_kit(name, where, waits=bool(public_key))


@app.command()
def key(
    *,
    out: Annotated[Path, typer.Option(help="Where the secret key goes; it stays on this device.")] = Path(
        "device.nk"
    ),
) -> None:
    """On a device: make its own key, and print the public one, which is all that leaves it."""
    from fedbus.app.provision.keys import Key, Of

    made = Key.new(Of.USER)
    made.save(_free(out))
    print(made.public)


@app.command()
def complete(
    kit: Annotated[Path, typer.Argument(help="The kit's folder.")],
    *,
    key: Annotated[Path, typer.Option(help="The device's own secret key.")] = Path("device.nk"),
) -> None:
    """On a device: put its own key to the kit that was made for it."""
    from fedbus.app.provision.keys import Key
    from fedbus.app.provision.kit import complete as completed

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
    trust: Folder = None,
) -> None:
    """A leaf node for a site: its clients connect to it, and one connection goes out to the federation."""
    from fedbus.app.provision.server import Place

    federation, where = _federation(trust), _free(out or Path("sites") / name)
    place = Place(at or where.absolute(), port)
    federation.write_site(
        name, client, task, where, place, hosts=host or ["localhost", "127.0.0.1"], days=days
    )
    print(f"start it at the site: nats-server -c {place.directory / 'leaf.conf'}")


@app.command("list")
def list_(*, json: show.AsJson = False, trust: Folder = None) -> None:
    """Who was let in, until when, and who was put out."""
    record = _federation(trust).record
    members = {**record.clients, **{f"site {name}": one for name, one in record.sites.items()}}
    if json:
        facts = [(name, one.standing, one.model_dump(mode="json")) for name, one in members.items()]
        show.as_json([{"name": name, "standing": standing, **rest} for name, standing, rest in facts])
    else:
        rows = [_row(name, one) for name, one in members.items()]
        empty = "nobody yet. Let a client in: fedbus provision client c1"
        show.table(("client", "standing", "until", "key"), rows, empty=empty)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The client's id, or the site's name.")],
    *,
    no_push: NoPush = False,
    trust: Folder = None,
) -> None:
    """Put a client out: its credentials are worth nothing from now on, and the server drops it."""
    federation = _federation(trust)
    federation.put_out(id)
    _push(federation, no_push=no_push)
    print(f"{id} is out")


@app.command()
def rotate(
    client: Annotated[str, typer.Argument(help="The client whose key is made anew.")] = "",
    *,
    tls: Annotated[bool, typer.Option("--tls", help="The server's certificate.")] = False,
    devices: Annotated[
        bool, typer.Option("--devices", help="What signs for devices: every kit that was given out is void.")
    ] = False,
    public_key: PublicKey = "",
    out: Out = None,
    days: Days = 365.0,
    no_push: NoPush = False,
    trust: Folder = None,
) -> None:
    """Make something anew: the server's certificate, what signs for devices, or one client's key."""
    federation = _federation(trust)
    if [bool(client), tls, devices].count(True) != 1:
        raise Failure("say what is made anew: a client's id, --tls or --devices", Exit.USAGE)
    if tls:
        federation.renew_server_certificate()
        federation.write_server_files()
        print(
            f"new certificate in {federation.nats / 'tls'}: bring it to the server, then nats-server --signal reload"
        )
        return
    if devices:
        federation.put_out_all_devices()
        _push(federation, no_push=no_push)
        print("every device is out until it has a new kit: fedbus provision client ID")
        return
    where = _free(out or Path("kits") / client)
    federation.admit_anew(client, public_key=public_key, days=days).write(where)
    _push(federation, no_push=no_push)
    _tell_of_kit(client, where, waits=bool(public_key))


@app.command()
def push(*, trust: Folder = None) -> None:
    """Tell the running server who belongs to the federation."""
    _push(_federation(trust), no_push=False)
    print("the server knows")


# --- what they share --------------------------------------------------------------------------------


def _folder(given: Path | None) -> Path:
    from fedbus.app.settings import Settings

    return (given or Settings.from_environment().home / "trust").absolute()


def _federation(given: Path | None) -> "Federation":
    from fedbus.app.provision.federation import Federation

    return Federation.open(_folder(given))


def _free(path: Path) -> Path:
    if path.exists():
        raise Failure(f"{path} is there already: move it away, or name another place with --out", Exit.USAGE)
    return path


def _push(federation: "Federation", *, no_push: bool) -> None:
    """What cannot be told now is not lost: it is written, and said to be."""
    from fedbus.app.session import now
    from fedbus.bus.access import Access
    from fedbus.bus.accounts import push_account
    from fedbus.bus.errors import BusError

    if no_push:
        return
    system = Access(federation.creds("system"), federation.ca)
    try:
        now(push_account(federation.record.url, system, federation.account_jwt()))
    except BusError as error:
        raise Failure(
            f"it is written, but the server does not know yet: {error} Then: fedbus provision push",
            Exit.UNREACHABLE,
        ) from None


def _tell_of_kit(name: str, where: Path, *, waits: bool) -> None:
    print(f"the kit of {name} is {where}: bring it to the device by a way that nobody else reads")
    folder = where.stem if where.suffix == ".tar" else where.name
    unpacked = f"tar xf {where.name} && " if where.suffix == ".tar" else ""
    if waits:
        print(f"there: {unpacked}fedbus provision complete {folder} --key device.nk")
    else:
        print(f"there: {unpacked}FEDBUS_KIT={folder} fedbus client up {name}")


def _row(name: str, one: "Member") -> tuple[str, str, str, str]:
    until = f"{one.expires:%Y-%m-%d}" if one.expires else "revoked"
    return name, one.standing, until, one.public_key
