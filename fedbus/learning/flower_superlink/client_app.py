"""The ClientApp of the bundle that fedbus gives to a SuperLink: it runs the task's own ClientApp on the device.

Flower starts a process for each message. The task's directory and its reference come from the environment.
`check` only imports the task's ClientApp.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedbus.contracts.task.compression import CompressionTable
from fedbus.learning.compression import make_encoding
from fedbus.learning.flower import task_code
from fedbus.learning.flower.compressed_records import server_decodes_updates
from fedbus.learning.flower.mods import compression_mod
from fedbus.learning.flower.private_api import CLIENT_APP_RAISED, LOAD_CLIENT_APP_FAILED

PATH_VARIABLE: Final = "FEDBUS_TASK_PATH"
REFERENCE_VARIABLE: Final = "FEDBUS_CLIENT_APP"
COMPRESSION_VARIABLE: Final = "FEDBUS_COMPRESSION"
BAD_TASK_EXIT_CODE: Final = 3


class TaskClientApp(ClientApp):
    """A ClientApp that loads another one at the first message. Its errors have the texts of library ``flower``."""

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            app = load_task_app()
        except task_code.BadTask as error:
            return Message(Error(LOAD_CLIENT_APP_FAILED, str(error)), reply_to=message)
        try:
            with server_decodes_updates():
                return _compress(app)(message, context)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an error of the app is its reply
            reason = f"the ClientApp raised {task_code.describe_error(error, _task_path())}"
            return Message(Error(CLIENT_APP_RAISED, reason), reply_to=message)


def task_environment(path: Path, reference: str, compression: CompressionTable) -> dict[str, str]:
    """Return the environment variables for the ClientApp *reference* in the directory *path*."""
    return {
        PATH_VARIABLE: str(path),
        REFERENCE_VARIABLE: reference,
        COMPRESSION_VARIABLE: compression.model_dump_json(),
    }


def load_task_app() -> ClientApp:
    """Load the ClientApp that the environment names. Raises BadTask."""
    return task_code.load_client_app(_task_path(), os.environ[REFERENCE_VARIABLE])


def _compress(app: ClientApp) -> Callable[[Message, Context], Message]:
    """Return *app* with the compression that the environment names."""
    encoding = make_encoding(CompressionTable.model_validate_json(os.environ[COMPRESSION_VARIABLE]))
    if encoding is None:
        return app
    mod = compression_mod(encoding)
    return lambda message, context: mod(message, context, app)


def check(problem: Path) -> None:
    """Import the ClientApp that the environment names. If it is invalid, write the reason to *problem*, and exit."""
    try:
        load_task_app()
    except task_code.BadTask as error:
        problem.write_text(str(error), encoding="utf-8")
        sys.exit(BAD_TASK_EXIT_CODE)


def _task_path() -> Path:
    return Path(os.environ[PATH_VARIABLE])


app = TaskClientApp()
