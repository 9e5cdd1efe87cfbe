"""The library ``flower-superlink``: a Flower app whose messages Flower's own SuperLink and SuperNodes carry.

Apps are the same as for the library ``flower``. This module is imported by agents that only read ``pyproject.toml``,
so it imports flwr in the methods that need it.
"""

from fedbus.learning.flower.library import FlowerLibrary, check_flower, remove_log_handlers
from fedbus.learning.library import ClientJob, ClientSession, ServerJob, ServerSession


class SuperLinkLibrary(FlowerLibrary):
    """The library ``flower-superlink``."""

    def open_server(self, job: ServerJob) -> ServerSession:
        check_flower()
        from fedbus.learning.flower_superlink.server_session import SuperLinkServer  # noqa: PLC0415 - imports flwr

        remove_log_handlers()
        return SuperLinkServer(job)

    def open_client(self, job: ClientJob) -> ClientSession:
        check_flower()
        from fedbus.learning.flower_superlink.client_session import SuperNodeClient  # noqa: PLC0415 - imports flwr

        remove_log_handlers()
        return SuperNodeClient(job)
