"""`fedbus gateway`: serve the dashboard."""

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
        str, typer.Option(envvar="FEDBUS_GATEWAY_HOST", help="Address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, envvar="FEDBUS_GATEWAY_PORT", help="Port to listen on; 0: a free one."
        ),
    ] = 8765,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FEDBUS_GATEWAY_HOSTS",
            help="Host name that browsers may use, in addition to localhost and --host. Repeatable.",
        ),
    ] = None,
    trace_url: Annotated[
        str,
        typer.Option(
            envvar="FEDBUS_TRACE_URL",
            help="URL of a trace with {trace_id} as placeholder, or the URL of Grafana.",
        ),
    ] = "",
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDBUS_GATEWAY_TOKEN_FILE",
            help="File with the token for sending commands; or set the token in FEDBUS_GATEWAY_TOKEN.",
            show_default="none, the dashboard is read-only",
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDBUS_GATEWAY_CERT",
            help="Certificate file; with --key, serve HTTPS. See: fedbus provision certificate.",
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(envvar="FEDBUS_GATEWAY_KEY", help="Private key of the certificate.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="FEDBUS_GATEWAY_INSECURE",
            help="Listen beyond localhost without a token or HTTPS, behind a proxy or in a protected network.",
        ),
    ] = False,
) -> None:
    """Serve the dashboard in a browser: clients, runs, models, events and schedules, live."""
    if is_supervised():  # `fedbus up` holds the other end of standard input
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
