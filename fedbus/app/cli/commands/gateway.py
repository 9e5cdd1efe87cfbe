"""`fedbus gateway`: the dashboard, in a browser."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fedbus.agents.common.child_process import exit_when_parent_dies
from fedbus.app.cli.foreground import run_until_signal
from fedbus.app.composition.dashboard import Dashboard, load_token
from fedbus.app.local.stack import inherited_socket, is_supervised
from fedbus.app.settings import Settings


def gateway(
    *,
    host: Annotated[
        str, typer.Option(envvar="FEDBUS_GATEWAY_HOST", help="Where to listen; 0.0.0.0 for every address.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, envvar="FEDBUS_GATEWAY_PORT", help="0: one that is free."),
    ] = 8765,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FEDBUS_GATEWAY_HOSTS",
            help="A name that browsers reach it by, beside localhost and --host. May be repeated.",
        ),
    ] = None,
    trace_url: Annotated[
        str,
        typer.Option(
            envvar="FEDBUS_TRACE_URL",
            help="Where a trace is looked at, with {trace_id} in the place of its id; or just where Grafana is.",
        ),
    ] = "",
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDBUS_GATEWAY_TOKEN_FILE",
            help="Holds the token that lets people act; FEDBUS_GATEWAY_TOKEN may hold it itself.",
            show_default="none, the dashboard only shows",
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDBUS_GATEWAY_CERT", help="With --key: serve by HTTPS; see: fedbus provision init."
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(envvar="FEDBUS_GATEWAY_KEY", help="The certificate's key.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="FEDBUS_GATEWAY_INSECURE",
            help="Let others reach it without a token or HTTPS, because a proxy or a network keeps them out.",
        ),
    ] = False,
) -> None:
    """Serve the dashboard: the fleet, runs, training, events, models and schedules, live in a browser."""
    if is_supervised():  # by `fedbus up`: then our standard input is its life line
        exit_when_parent_dies()
    dashboard = Dashboard(
        Settings.from_environment(),
        host,
        port,
        allow_host or (),
        trace_url,
        load_token(dict(os.environ), token_file),
        certificate,
        key,
        insecure,
        inherited_socket(),
    )
    run_until_signal(dashboard.serve, "gateway")
