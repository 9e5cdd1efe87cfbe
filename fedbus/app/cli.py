"""The command line: the commands put together, and nothing else.

Each family of commands is a module in `fedbus.app.commands`; where errors end, and what the
exit codes mean, stands in `fedbus.app.edge`. Importing this module must stay fast, since
`fedbus events decode` is started for every message that `nats sub --translate` shows: what
takes long to import is imported by the command that needs it.
"""

from typing import NoReturn

import typer

from fedbus.app.commands import clients, code, data, events, model, provision, run, serve, task
from fedbus.app.commands.context import context
from fedbus.app.commands.doctor import doctor, version
from fedbus.app.commands.gateway import gateway
from fedbus.app.commands.top import top
from fedbus.app.commands.trace import trace
from fedbus.app.commands.verify import verify
from fedbus.app.commands.why import why
from fedbus.app.edge import MEANINGS, edge

EXIT_CODES = "\n\n".join(f"{code:>3}  {meaning}" for code, meaning in MEANINGS.items())

app = typer.Typer(
    name="fedbus",
    help="Operates federated learning: the whole life of a Flower app over a fleet of devices.",
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
app.command()(serve.demo)
app.command()(serve.up)
app.add_typer(serve.server, name="server")
app.add_typer(serve.client, name="client")
app.command()(serve.agent)
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
    edge(app)


if __name__ == "__main__":
    main()
