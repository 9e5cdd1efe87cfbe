"""The private API of Flower with which fedbus uses a SuperLink, checked when this module is imported.

    SuperLinkClient   the Control and Runtime APIs of a SuperLink: Flower's own clients of them are private
    HttpGrid          the Grid of Flower's ``flwr-serverapp`` process
    serve_superlink   the command ``flower-superlink``, with a middleware that fedbus adds
    serve_supernode   the command ``flower-supernode``

`tests/learning/flower_superlink` fails if Flower changes the behaviour of one of them.
"""

import ssl
from collections.abc import Sequence
from typing import Any, Final

from fedbus.learning.flower import flower_version
from fedbus.learning.library import TrainingFailed

with flower_version.checked_imports():
    import httpx
    from flwr.common.serde import run_from_proto
    from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        PullTaskInputRequest,
        PushTaskOutputRequest,
        SendTaskHeartbeatRequest,
    )
    from flwr.supercore.constant import TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.error import FlowerError
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supercore.interceptors import (
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

_ATTRIBUTES: Final[dict[Any, tuple[str, ...]]] = {
    ControlHttpClient: ("RegisterNode", "UnregisterNode", "StartRun", "close", "from_server_address"),
    RuntimeHttpClient: ("AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat"),
    HttpGrid: ("_runtime_client", "set_run", "get_node_ids", "push_messages", "pull_messages", "close"),
    HeartbeatSender: ("start", "stop", "is_running"),
    TaskIdentity: ("task_id", "run_id", "node_id"),
    TaskType: ("SERVER_APP",),
    FlowerError: ("from_json",),
}
for _owner, _names in _ATTRIBUTES.items():
    flower_version.require_attributes(_owner, _names)

__all__ = ["HttpGrid", "SuperLinkClient", "SuperLinkError", "serve_superlink", "serve_supernode"]

_ACQUIRE_TASK: Final = "/flwr.proto.Runtime/AcquireTask"
RETRY_S: Final = 15.0
"""The limit for which a call is repeated while the SuperLink cannot be reached, in seconds."""


class SuperLinkError(TrainingFailed):
    """The SuperLink refused a request, or cannot be reached. The text is one line with its reason."""


class SuperLinkClient:
    """A client of the Control and Runtime APIs of the SuperLink at *address* (``host:port``).

    *certificate* is the PEM of the SuperLink's own certificate, *secret* that of its SuperExec.
    """

    def __init__(self, address: str, *, certificate: bytes, secret: bytes) -> None:
        self._address = address
        self._certificate = certificate
        self._secret = secret
        self._control = ControlHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=certificate,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr")],
            retry_invoker=_bounded_retries(),
        )
        self._heartbeat: HeartbeatSender | None = None
        self._grid: HttpGrid | None = None

    def register_node(self, public_key: bytes, name: str) -> int:
        """Allow a SuperNode with *public_key* (PEM) to connect, and return its node id."""
        request = RegisterNodeRequest(public_key=public_key, name=name)
        response = _call(self._control.RegisterNode, request)
        return int(response.node_id)

    def unregister_node(self, node_id: int) -> None:
        """Remove a SuperNode: messages to it get an error as their reply."""
        _call(self._control.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def start_run(self, fab: bytes) -> HttpGrid:
        """Start a run of the app bundle *fab*, and return the Grid of its ServerApp, which this process runs.

        The process gets the identity of the ServerApp's task, as in Flower's own ``flwr-serverapp``.
        """
        _call(self._control.StartRun, StartRunRequest(fab=Fab(content=fab)))
        token = self._acquire_task()
        grid = HttpGrid(self._address, root_certificates=self._certificate, token=token)
        grid._retry_invoker.max_time = RETRY_S  # noqa: SLF001 - else a call never ends if the SuperLink dies
        runtime = grid._runtime_client  # noqa: SLF001 - the Grid has no method for its task
        task = _call(runtime.PullTaskInput, PullTaskInputRequest())
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        self._grid = grid
        self._heartbeat = HeartbeatSender(lambda: _send_heartbeat(runtime))
        self._heartbeat.start()
        return grid

    def finish_run(self) -> None:
        """Report the end of the ServerApp, so that SuperNodes stop working on the run."""
        if self._grid:
            runtime = self._grid._runtime_client  # noqa: SLF001
            _call(runtime.PushTaskOutput, PushTaskOutputRequest(sub_status="completed"))

    def close(self) -> None:
        if self._heartbeat and self._heartbeat.is_running:
            self._heartbeat.stop()
        if self._grid:
            self._grid.close()
        self._control.close()

    def _acquire_task(self) -> str:
        signature = SuperExecAuthHttpInterceptor(
            master_secret=self._secret, protected_methods={_ACQUIRE_TASK}
        )
        runtime = RuntimeHttpClient.from_server_address(
            self._address,
            insecure=False,
            root_certificates=self._certificate,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), signature],
            retry_invoker=_bounded_retries(),
        )
        try:
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            response = _call(runtime.AcquireTask, request)
        finally:
            runtime.close()
        if not response.token:
            raise SuperLinkError("the SuperLink offers no task for the run that was started")
        return str(response.token)


def serve_superlink(middleware: Sequence[Any]) -> None:
    """Run the command ``flower-superlink`` with the arguments of this process. *middleware* sees each request first."""
    with flower_version.checked_imports():
        from flwr.superlink import extensions  # noqa: PLC0415 - only this process needs it
        from flwr.superlink.cli import flower_superlink  # noqa: PLC0415
    flower_version.require_attributes(extensions, ("get_middleware",))
    extensions.get_middleware = lambda: tuple(middleware)
    flower_superlink()


def serve_supernode() -> None:
    """Run the command ``flower-supernode`` with the arguments of this process."""
    with flower_version.checked_imports():
        from flwr.supernode.cli import flower_supernode  # noqa: PLC0415 - only this process needs it
    flower_supernode()


def _bounded_retries() -> Any:
    retries = make_simple_http_retry_invoker()
    retries.max_time = RETRY_S
    return retries


def _call(method: Any, request: Any) -> Any:
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        detail = FlowerError.from_json(error.response.text)
        raise SuperLinkError(f"the SuperLink refused {type(request).__name__}: {detail or error}") from error
    except (httpx.HTTPError, ssl.SSLError, RuntimeError) as error:  # RuntimeError: the client is closed
        raise SuperLinkError(f"the SuperLink cannot be reached: {type(error).__name__}: {error}") from error


def _send_heartbeat(runtime: RuntimeHttpClient) -> bool:
    try:
        return bool(runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
    except httpx.HTTPError:
        return False
