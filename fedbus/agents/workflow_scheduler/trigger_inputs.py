"""The messages that triggers read: the last values of the devices, the deployed code and the other tasks' runs.

None of them is state of the scheduler: a new one reads the same values from the bus.
"""

from collections.abc import Mapping
from datetime import datetime

from fedbus.contracts.code import CodePublished
from fedbus.contracts.message import Message
from fedbus.contracts.run import RunData, RunState
from fedbus.contracts.serving import DataChecked, DataCounted, DriftDetected
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition
from fedbus.domain.triggers import ClientAccuracy, ClientRowCount

TRIGGER_MESSAGES = (DataCounted, DataChecked, DriftDetected, CodePublished)


class TriggerInputTracker:
    """The last value of each sender."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._counted: dict[str, tuple[DataCounted, datetime]] = {}
        self._last_check: dict[str, datetime] = {}
        """The time of the last check or drift message of each client."""
        self.drifted: dict[str, datetime] = {}
        """The clients that drift, and since when: from the first report until a check finds no drift."""
        self.accuracy: dict[str, ClientAccuracy] = {}
        """The live accuracy of the model that each client serves, if enough labels are known."""
        self.finished: dict[str, datetime] = {}
        """When the last run of each other task finished."""
        self.code: tuple[str, datetime] | None = None
        """The deployed code version, and since when."""
        self.last_change: datetime | None = None
        """When a device last sent a message that changed a value."""

    @property
    def code_version(self) -> str:
        """The deployed code version; empty if it is not known."""
        return self.code[0] if self.code is not None else ""

    def record(self, message: Message, at: datetime) -> None:
        match message:
            case DataCounted(client=client):
                self._counted[client] = (message, at)
            case DriftDetected() | DataChecked():
                if not self._record_check(message, at):
                    return
            case CodePublished(code_version=version):
                if self.code_version != version:
                    self.code = (version, at)
                return
            case _:
                return
        self.last_change = max(at, self.last_change or at)

    def _record_check(self, message: DriftDetected | DataChecked, at: datetime) -> bool:
        """Record that a client has checked its data; True if a value changed.

        A message that was read at the start may be delivered again, when a newer one is known.
        """
        if at < self._last_check.get(message.client, at):
            return False
        self._last_check[message.client] = at
        if isinstance(message, DriftDetected):
            return self._record_drift(message.client, at, drifting=True)
        accuracy_changed = self._record_accuracy(message, at)
        return self._record_drift(message.client, at, drifting=message.drifting) or accuracy_changed

    def _record_drift(self, client: str, at: datetime, *, drifting: bool) -> bool:
        if drifting == (client in self.drifted):
            return False
        if drifting:
            self.drifted[client] = at
        else:
            del self.drifted[client]
        return True

    def _record_accuracy(self, checked: DataChecked, at: datetime) -> bool:
        """Record the accuracy of the model that serves, if enough labels are known; True if it changed."""
        before = self.accuracy.pop(checked.client, None)
        for one in checked.live:
            if one.version == checked.serving and one.labelled >= self.task.table.checks.min_labelled:
                self.accuracy[checked.client] = ClientAccuracy(one.right / one.labelled, at)
        now = self.accuracy.get(checked.client)
        return (before and before.accuracy) != (now and now.accuracy)

    def record_run(self, message: Message, at: datetime) -> bool:
        """Record a transition of any task's run; True if a run of another task has finished."""
        match message:
            case Transition(task=task, target=RunState.FINISHED, facts=RunData()) if task != self.task.id:
                self.finished[task] = max(at, self.finished.get(task, at))
                return True
            case _:
                return False

    def total_rows(self, kind: str) -> dict[str, int]:
        """Return the rows of *kind* that each client has ever captured: ``labelled`` or ``unlabelled``."""
        return {client: _total_rows(counted, kind) for client, (counted, _) in self._counted.items()}

    @property
    def databases(self) -> dict[str, str]:
        """The database in which each client counts its rows."""
        return {client: counted.database for client, (counted, _) in self._counted.items()}

    def new_rows(
        self, kind: str, since: Mapping[str, int], databases: Mapping[str, str]
    ) -> dict[str, ClientRowCount]:
        """Return the rows of *kind* that came after the totals *since*, which were counted in *databases*."""
        return {
            client: ClientRowCount(
                _new_rows(counted, kind, since.get(client, 0), databases.get(client, "")), at
            )
            for client, (counted, at) in self._counted.items()
        }


def _new_rows(counted: DataCounted, kind: str, since: int, database: str) -> int:
    total = _total_rows(counted, kind)
    # Without a database, an older device reported the rows that it stored. Fewer of these are not new rows.
    if not database:
        return max(0, total - since)
    is_new_database = database != counted.database or total < since
    return total if is_new_database else total - since


def _total_rows(counted: DataCounted, kind: str) -> int:
    """Return the rows ever captured; an older device reports only the rows that it stores."""
    ever, stored = {
        "labelled": (counted.labelled_ever, counted.labelled),
        "unlabelled": (counted.unlabelled_ever, counted.unlabelled),
    }[kind]
    return stored if ever is None else ever
