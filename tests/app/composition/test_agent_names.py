"""The names for `fedbus agent`: one agent, or several of one side."""

import pytest
from typer.testing import CliRunner

from fedbus.app.cli.commands.run_agents import service_name
from fedbus.app.cli.main import app
from fedbus.app.failures import CliError, ExitCode


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no-such-agent"], "unknown agent 'no-such-agent'. Choose one of: server-manager"),
        (["client-manager,"], "unknown agent ''. Choose one of: server-manager"),
        (
            ["client-manager,server-manager"],
            "agents of the server side and of a client cannot share a process",
        ),
        (["client-manager,device-monitor"], "Name the client with --client ID"),
    ],
)
def test_agents_that_cannot_share_a_process_are_refused(arguments: list[str], complaint: str) -> None:
    error = CliRunner().invoke(app, ["agent", *arguments]).exception
    assert isinstance(error, CliError)
    assert complaint in str(error)
    assert error.code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("agents", "service"),
    [
        (["device-monitor"], "device-monitor"),
        (["client-manager", "device-monitor"], "client"),
        (["workflow-scheduler", "server-manager"], "server"),
    ],
)
def test_agents_in_one_process_are_one_service_of_their_side(agents: list[str], service: str) -> None:
    assert service_name(agents) == service
