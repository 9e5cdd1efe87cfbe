"""`fedbus provision revoke`, `rotate` and `push`: change credentials and send the change to nats-server."""

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

NoPush = Annotated[
    bool, typer.Option("--no-push", help="Do not send the change to nats-server; send it later with `push`.")
]


KeepOld = Annotated[
    bool,
    typer.Option(
        "--keep-old",
        help="Keep the old key valid until it expires or is revoked, so that its holder stays connected.",
    ),
]


Url = Annotated[
    str, typer.Option(help="URL of nats-server from this machine.", show_default="the one that init set")
]


def revoke(
    name: Annotated[str, typer.Argument(help="A client, site, user or role, from `fedbus provision list`.")],
    *,
    no_push: NoPush = False,
    url: Url = "",
    trust: TrustFolder = None,
) -> None:
    """Revoke credentials; nats-server closes the connections that use them."""
    federation = open_federation(trust)
    federation.revoke(name)
    _print_affected_sites(federation, name)
    _push(federation, url, no_push=no_push)
    print(f"the credentials of {name} are revoked")


def rotate(
    name: Annotated[
        str,
        typer.Argument(
            help="Rotate the key of this client, site, user or role, from `fedbus provision list`."
        ),
    ] = "",
    *,
    tls: Annotated[bool, typer.Option("--tls", help="Rotate the server certificate.")] = False,
    ca: Annotated[
        bool,
        typer.Option(
            "--ca", help="Rotate the CA and the server certificate; each kit then needs the new ca.pem."
        ),
    ] = False,
    devices: Annotated[
        bool,
        typer.Option("--devices", help="Rotate the device signing key; all kits of clients become invalid."),
    ] = False,
    public_key: PublicKey = "",
    keep_old: KeepOld = False,
    out: Out = None,
    days: Days = 365.0,
    no_push: NoPush = False,
    url: Url = "",
    trust: TrustFolder = None,
) -> None:
    """Rotate a key, the server certificate, the CA or the device signing key."""
    federation = open_federation(trust)
    if [bool(name), tls, ca, devices].count(True) != 1:
        raise CliError(
            "nothing to rotate, or more than one thing. Name one: a name from list, --tls, --ca or --devices",
            ExitCode.USAGE,
        )
    if tls or ca:
        federation.renew_server_certificate(new_authority=ca)
        federation.write_server_files()
        _print_certificate_steps(federation, new_authority=ca)
        return
    if devices:
        federation.revoke_all_devices()
        _push(federation, url, no_push=no_push)
        print("all client kits are invalid. Create new ones: fedbus provision client ID")
        return
    print_steps = _rotate_member(federation, name, out, public_key=public_key, days=days, keep_old=keep_old)
    _push(federation, url, no_push=no_push)
    print_steps()


def _rotate_member(
    federation: Federation, name: str, out: Path | None, *, public_key: str, days: float, keep_old: bool
) -> Callable[[], None]:
    """Rotate the key of *name*; return what prints the next steps once nats-server has the change."""
    kind, _ = federation.registry.find(name)
    match kind:
        case MemberKind.ROLE:
            path = federation.renew_role(Role(name), days=days, keep_old=keep_old)
            return partial(print, f"the new credentials of {name} are {path}. Copy them to its machine")
        case MemberKind.SITE:
            path = out or Path("sites") / name
            federation.renew_site(name, path, days=days, keep_old=keep_old)
            return partial(print_site_steps, name, path, federation)
        case MemberKind.CLIENT | MemberKind.PERSON:
            path = _check_free_or_kit(out or Path("kits") / name)
            kit = federation.reissue(name, public_key=public_key, days=days, keep_old=keep_old)
            kit.write(path, replace=True)
            use = f"fedbus client up {name}" if kind is MemberKind.CLIENT else "fedbus clients ls"
            return partial(print_kit_steps, name, path, use, needs_key=bool(public_key))


def push(*, url: Url = "", trust: TrustFolder = None) -> None:
    """Send the current credentials and revocations to nats-server."""
    _push(open_federation(trust), url, no_push=False)
    print("nats-server has the current credentials")


def _check_free_or_kit(path: Path) -> Path:
    """Allow to overwrite an old kit, which the new key makes invalid."""
    return path if is_kit(path) else check_free(path)


def _push(federation: Federation, url: str, *, no_push: bool) -> None:
    """Send the account to nats-server; the change is already in the trust folder."""
    if no_push:
        return
    system = BusAccess(federation.creds_path("system"), federation.ca_path)
    at = check_url(url) if url else federation.registry.url
    try:
        with progress_bar(f"updating nats-server at {at}"):
            run_async(
                push_account_jwts(at, system, federation.account_jwts(), host=federation.certificate_host(at))
            )
    except BusError as error:
        retry = "Retry with: fedbus provision push, and --url if its URL is different from this machine"
        raise CliError(
            f"the change is saved, but nats-server does not have it yet: {str(error).rstrip('.')}. {retry}",
            ExitCode.UNREACHABLE,
        ) from None


def _print_affected_sites(federation: Federation, client: str) -> None:
    for name, site in federation.registry.sites_of(client).items():
        if site.system_keys:
            print(f"site {name} has client {client}: its leaf node gets the change when it is connected")
        else:
            print(
                f"site {name} has client {client}, and accepts it until its folder is replaced. Run "
                f"fedbus provision rotate {name}, copy the folder to the site and restart the leaf node"
            )


def _print_certificate_steps(federation: Federation, *, new_authority: bool) -> None:
    if new_authority:
        print(f"new CA: first copy {federation.ca_path} to each kit and to each machine with credentials")
        for name in federation.registry.sites:
            print(f"then run: fedbus provision rotate {name} --keep-old, and copy the folder to the site")
    print(
        f"new certificate in {federation.nats_folder / 'tls'}: copy it to the server, then run: "
        "nats-server --signal reload"
    )
