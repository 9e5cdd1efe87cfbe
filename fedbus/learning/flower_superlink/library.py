"""The library ``flower-superlink``: a Flower app whose messages Flower's own SuperLink and SuperNodes carry.

Apps are the same as for the library ``flower``. This module is imported by agents that only read ``pyproject.toml``,
so it imports flwr in the methods that need it.
"""

from fedbus.contracts.task.aggregation import AggregationMode
from fedbus.learning.flower.library import FlowerLibrary, check_flower, remove_log_handlers
from fedbus.learning.library import ClientJob, ClientSession, ModeUnsupported, ServerJob, ServerSession


class SuperLinkLibrary(FlowerLibrary):
    """The library ``flower-superlink``."""

    def open_server(self, job: ServerJob) -> ServerSession:
        check_flower()
        if (mode := job.aggregation.mode) is not AggregationMode.SYNC:
            raise ModeUnsupported(
                f"the aggregation mode {mode} does not work with the library flower-superlink: Flower's SuperLink "
                'carries the messages. Use library = "flower", or mode = "sync"'
            )
        from fedbus.learning.flower_superlink.server_session import SuperLinkServer  # noqa: PLC0415 - imports flwr

        remove_log_handlers()
        return SuperLinkServer(job)

    def open_client(self, job: ClientJob) -> ClientSession:
        check_flower()
        from fedbus.learning.flower_superlink.client_session import SuperNodeClient  # noqa: PLC0415 - imports flwr

        remove_log_handlers()
        return SuperNodeClient(job)
