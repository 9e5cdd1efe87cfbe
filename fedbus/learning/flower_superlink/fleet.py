"""The SuperNodes of a run, one on each client: starts them, watches them, and maps Flower's node ids to clients."""

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Final

import structlog

from fedbus.learning.flower_superlink.messages import KEY_KIND, WATCH_KIND, KeyRequest, NodeKey, WatchRequest
from fedbus.learning.flower_superlink.private_api import SuperLinkError
from fedbus.learning.flower_superlink.superlink import SuperLink
from fedbus.learning.library import Messenger, MessengerClosed, OutgoingMessage
from fedbus.learning.payload import Payload

MAX_WATCH_S: Final = 60.0
"""The limit of a client for its answer to a `WatchRequest` while its SuperNode runs, in seconds."""
WATCH_SHARE: Final = 0.5
"""That time as a share of the plan's limit for one message."""
MAX_STARTS: Final = 3
"""How often a SuperNode is started on one client. Only one that was connected is started again."""

log = structlog.get_logger("fedbus.learning")


class SuperNodes:
    """The SuperNodes of the clients of a run. A thread for each client waits for its answers."""

    def __init__(self, messenger: Messenger, link: SuperLink) -> None:
        self._messenger = messenger
        self._link = link
        self.changed = threading.Condition()
        """Notified when a SuperNode is registered or has ended."""
        self._clients: dict[int, str] = {}
        """Every client that had a SuperNode, by node id."""
        self._nodes: dict[str, int] = {}
        """The SuperNodes that are registered now, by client."""
        self._is_closed = False
        self._watched: set[str] = set()
        self._starts: Counter[str] = Counter()
        self._connected: set[str] = set()
        """The clients whose SuperNode was connected at some time."""
        self._failures: dict[int, str] = {}
        """The reasons of SuperNodes that have ended, by node id."""
        self.failed: dict[str, str] = {}
        """The reasons of clients without a SuperNode, by client."""
        self._unreported: dict[str, str] = {}
        """Those that no round has reported."""

    def close(self) -> None:
        """Ignore what happens to the SuperNodes from now on. They end with their clients' sessions."""
        with self.changed:
            self._is_closed = True
            self.changed.notify_all()

    def start_missing(self) -> None:
        """Start a SuperNode on each present client that has none, without waiting for it.

        A client whose SuperNode was connected and has ended, or that left the run and is present again, gets a new one.
        """
        present = self._messenger.clients()
        with self.changed:
            new = [client for client in present if client not in self._watched and self._may_start(client)]
            self._watched |= set(new)
            self._starts.update(new)
            self.failed = {client: reason for client, reason in self.failed.items() if client not in new}
        for client in new:
            threading.Thread(
                target=self._serve, args=(client,), name=f"SuperNode {client}", daemon=True
            ).start()

    def wait_until_registered(self, timeout_s: float) -> None:
        """Wait until each client on which one was started has a registered SuperNode, or has failed."""
        with self.changed:
            self.changed.wait_for(lambda: self._is_closed or self._watched <= set(self._nodes), timeout_s)

    @property
    def nodes(self) -> dict[str, int]:
        """The registered SuperNodes by client."""
        with self.changed:
            return dict(self._nodes)

    def client_of(self, node_id: int) -> str:
        """Return the client of a SuperNode, also of one that has ended."""
        with self.changed:
            return self._clients.get(node_id, f"node {node_id}")

    def failures_of(self, node_ids: Iterable[int]) -> dict[int, str]:
        """Return the reasons of those SuperNodes that have ended, by node id."""
        with self.changed:
            found = {node_id: self._failures[node_id] for node_id in node_ids if node_id in self._failures}
            for node_id in found:
                self._unreported.pop(self._clients[node_id], None)
            return found

    def take_unreported(self) -> dict[str, str]:
        """Return the reasons of clients without a SuperNode, each once, by client."""
        with self.changed:
            unreported, self._unreported = self._unreported, {}
            return unreported

    def record_connected(self, node_ids: Iterable[int]) -> None:
        """Record that SuperNodes are connected."""
        with self.changed:
            self._connected |= {self._clients[node_id] for node_id in node_ids if node_id in self._clients}

    def _may_start(self, client: str) -> bool:
        starts = self._starts[client]
        return starts == 0 or (client in self._connected and starts < MAX_STARTS)

    def _serve(self, client: str) -> None:
        """Start the SuperNode of *client*, and watch it until it ends."""
        try:
            reason = self._start_and_watch(client)
        except MessengerClosed:
            self.close()
            return
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.exception("SuperNode watch failed", client=client)
        self._record_failure(client, reason)

    def _start_and_watch(self, client: str) -> str:
        """Return the reason of the end."""
        try:
            key = NodeKey.unpack(self._request(client, KEY_KIND, KeyRequest().pack()))
            node_id = self._link.register_node(key.public_key, client)
        except (_RequestFailed, SuperLinkError) as error:
            return str(error)
        with self.changed:
            self._clients[node_id] = client
            self._nodes[client] = node_id
            self.changed.notify_all()
        wait_s = min(MAX_WATCH_S, self._messenger.plan.round_s * WATCH_SHARE)
        request = WatchRequest(
            address=self._link.address, certificate=self._link.certificate, wait_s=wait_s
        ).pack()
        try:
            while not self._is_closed:
                self._request(client, WATCH_KIND, request)
        except _RequestFailed as error:
            return str(error)
        return "the run is over"

    def _request(self, client: str, kind: str, payload: Payload) -> bytes | memoryview:
        """Send a request and return the content of its reply. Raises _RequestFailed, MessengerClosed."""
        [reply] = self._messenger.send([OutgoingMessage(client=client, kind=kind, payload=payload)])
        if reply.error is not None:
            raise _RequestFailed(reply.error.reason.removeprefix(f"{client}: "))
        return reply.data or b""

    def _record_failure(self, client: str, reason: str) -> None:
        with self.changed:
            if self._is_closed:
                return
            node_id = self._nodes.pop(client, None)
            self._watched.discard(client)
            self.failed[client] = self._unreported[client] = reason
            if node_id is not None:
                self._failures[node_id] = reason
            self.changed.notify_all()
        log.warning("SuperNode ended", client=client, reason=reason)
        if node_id is not None:
            try:
                self._link.unregister_node(node_id)
            except SuperLinkError as error:
                log.info("SuperNode not removed from the SuperLink", client=client, reason=str(error))


class _RequestFailed(Exception):
    """A client answered with an error, or not at all. The text is the reason."""
