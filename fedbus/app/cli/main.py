"""The command line: the commands put together, and nothing else.

Each family of commands is a module in `fedbus.app.cli.commands`; where errors end, and what the
exit codes mean, stands in `fedbus.app.failures`. Importing this module must stay fast, since
`fedbus events decode` is started for every message that `nats sub --translate` shows: what
takes long to import is imported by the command that needs it.
"""

from typing import NoReturn

import typer

from fedbus.app.cli.commands import clients, code, data, events, model, provision, run, run_agents, task
from fedbus.app.cli.commands.context import context
from fedbus.app.cli.commands.doctor import doctor, version
from fedbus.app.cli.commands.gateway import gateway
from fedbus.app.cli.commands.top import top
from fedbus.app.cli.commands.trace import trace
from fedbus.app.cli.commands.verify import verify
from fedbus.app.cli.commands.why import why
from fedbus.app.failures import EXIT_CODE_TEXT, run_cli

EXIT_CODES = "\n\n".join(f"{code:>3}  {meaning}" for code, meaning in EXIT_CODE_TEXT.items())

app = typer.Typer(
    name="fedbus",
    help="Operate federated learning: the full lifecycle of a Flower app on a fleet of devices.",
    epilog=f"Exit codes:\n\n{EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(run.app, name="run")
app.add_typer(clients.app, name="clients")
app.add_typer(model.app, name="model")
app.add_typer(code.app, name="code")
app.add_typer(data.app, name="data")
app.add_typer(events.app, name="events")
app.add_typer(task.app, name="task")
app.command()(run_agents.demo)
app.command()(run_agents.up)
app.add_typer(run_agents.server, name="server")
app.add_typer(run_agents.client, name="client")
app.command()(run_agents.agent)
app.command()(gateway)
app.command()(top)
app.command()(trace)
app.command()(verify)
app.command()(why)
app.add_typer(provision.app, name="provision")
app.command()(context)
app.command()(doctor)
app.command()(version)


def main() -> NoReturn:
    """The entry point ``fedbus``."""
    run_cli(app)


if __name__ == "__main__":
    main()
