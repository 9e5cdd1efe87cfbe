"""`fedbus model`: what the model repository holds, whether it is what it says, and which version is served.

What only looks reads the repository itself, with no bus and no server: a directory or an S3, see
`fedbus.stores.models`. What changes the version that is served asks the server manager.
"""

import typer

from fedbus.app.commands.model import access, bucket, champion, check, compare, export, keys, listing

app = typer.Typer(
    no_args_is_help=True, help="The versions of a task's model: what is there, is it sound, which is served."
)
app.command()(listing.ls)
app.command("show")(listing.show_)
app.command()(compare.diff)
app.command()(check.verify)
app.command()(export.export)
app.command()(bucket.bucket)
app.command()(champion.promote)
app.command()(champion.rollback)
app.command()(champion.init)
app.command()(access.access)
app.command()(keys.keygen)
