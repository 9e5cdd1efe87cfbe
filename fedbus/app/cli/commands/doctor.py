"""`fedbus doctor`: check this machine."""

from typing import Annotated

import typer

from fedbus.app.diagnostics.doctor import run_checks
from fedbus.app.failures import CliError
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json
from fedbus.app.terminal.progress_bar import progress_bar


def doctor(
    *,
    json: output.JsonOption = False,
    offline: Annotated[bool, typer.Option("--offline", help="Skip checks that need NATS.")] = False,
) -> None:
    """Check this machine and its NATS connection; print how to fix each problem."""
    settings = Settings.from_environment()
    with progress_bar("checking this machine" if offline else "checking this machine and NATS"):
        findings = run_checks(settings, offline=offline)
    if json:
        print_json([finding.as_json() for finding in findings])
    else:
        for finding in findings:
            output.console().print(finding.render())
    if problems := [finding for finding in findings if finding.is_error]:
        raise CliError(f"{pluralize(len(problems), 'problem')} found")
