"""`fedbus provision revoke`, `rotate` and `push`: change credentials, and send the change to the NATS server."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.bus_session import run_async
from fedbus.app.cli.commands.provision.common import (
    Days,
    Out,
    PublicKey,
    TrustFolder,
    check_free,
    open_federation,
    print_kit_steps,
    print_site_steps,
)
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.provision.federation import Federation
from fedbus.app.provision.hosts import check_url
from fedbus.app.provision.kit import is_kit
from fedbus.app.provision.registry import MemberKind
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.bus.account_admin import push_account_jwts
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import BusError
from fedbus.contracts.permissions import Role

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


def revoke(
    name: Annotated[str, typer.Argument(help="A client, site, person or role, as list shows it.")],
    *,
    no_push: NoPush = False,
    url: Url = "",
    trust: TrustFolder = None,
) -> None:
    """Put somebody out: the credentials are worth nothing from now on, and the server drops who uses them."""
    federation = open_federation(trust)
    federation.revoke(name)
    _print_affected_sites(federation, name)
    _push(federation, url, no_push=no_push)
    print(f"{name} is out")


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
    federation = open_federation(trust)
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
    federation: Federation, name: str, out: Path | None, *, public_key: str, days: float, keep_old: bool
) -> Callable[[], None]:
    """Make the key of *name* anew; what tells of it when the server knows."""
    kind, _ = federation.record.find(name)
    match kind:
        case MemberKind.ROLE:
            where = federation.renew_role(Role(name), days=days, keep_old=keep_old)
            return partial(print, f"the new credentials of {name} are {where}: bring them to where it runs")
        case MemberKind.SITE:
            where = out or Path("sites") / name
            federation.renew_site(name, where, days=days, keep_old=keep_old)
            return partial(print_site_steps, name, where, federation)
        case MemberKind.CLIENT | MemberKind.PERSON:
            where = _check_free_or_kit(out or Path("kits") / name)
            kit = federation.reissue(name, public_key=public_key, days=days, keep_old=keep_old)
            kit.write(where, anew=True)
            use = f"fedbus client up {name}" if kind is MemberKind.CLIENT else "fedbus clients ls"
            return partial(print_kit_steps, name, where, use, waits=bool(public_key))


def push(*, url: Url = "", trust: TrustFolder = None) -> None:
    """Tell the running server who belongs to the federation."""
    _push(open_federation(trust), url, no_push=False)
    print("the server knows")


def _check_free_or_kit(path: Path) -> Path:
    """Where a kit is made anew: the old one there is worth nothing."""
    return path if is_kit(path) else check_free(path)


def _push(federation: Federation, url: str, *, no_push: bool) -> None:
    """What cannot be told now is not lost: it is written, and said to be."""
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


def _print_affected_sites(federation: Federation, client: str) -> None:
    for name, site in federation.record.carriers(client).items():
        if site.system_keys:
            print(f"site {name} carries {client}: its leaf node hears of it by itself, when it is connected")
        else:
            print(
                f"site {name} carries {client}, and lets it in until it has a new folder: "
                f"fedbus provision rotate {name}, then bring it there and start the leaf node again"
            )


def _print_certificate_steps(federation: Federation, *, new_authority: bool) -> None:
    if new_authority:
        print(f"new authority: first bring {federation.ca} into every kit, beside all credentials")
        for name in federation.record.sites:
            print(f"then the site:   fedbus provision rotate {name} --keep-old, and bring its folder there")
    print(
        f"new certificate in {federation.nats / 'tls'}: bring it to the server, then nats-server --signal reload"
    )
