"""`fedbus model`: what the model repository holds, whether it is what it says, and which version is served.

What only looks reads the repository itself, with no bus and no server: a directory or an S3, see
`fedbus.stores.models.open`. What changes the version that is served asks the server manager.
"""

import typer

from fedbus.app.cli.commands.model import access, bucket, diff, export, keys, ls, promote, verify

app = typer.Typer(no_args_is_help=True, help="Model versions of a task: list, verify, promote, export.")
app.command()(ls.ls)
app.command("show")(ls.show_)
app.command()(diff.diff)
app.command()(verify.verify)
app.command()(export.export)
app.command()(bucket.bucket)
app.command()(promote.promote)
app.command()(promote.rollback)
app.command()(promote.init)
app.command()(access.access)
app.command()(keys.keygen)
