"""What devices, the code and other tasks have said, as far as triggers read it: the log, kept up to date.

Nothing of it is state of the scheduler's own: a new one reads the same from the bus.
"""

from collections.abc import AsyncIterator, Mapping
from datetime import datetime

from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.code import CodePublished
from fedbus.contracts.message import Message
from fedbus.contracts.run import RunData, RunState
from fedbus.contracts.serving import DataChecked, DataCounted, DriftDetected
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition
from fedbus.domain.triggers import ClientAccuracy, ClientRowCount

TRIGGER_MESSAGES = (DataCounted, DataChecked, DriftDetected, CodePublished)


class TriggerInputTracker:
    """What was said last, of each sender."""

    def __init__(self, bus: Bus, task: Task) -> None:
        self._bus = bus
        self.task = task
        self._counted: dict[str, tuple[DataCounted, datetime]] = {}
        self.drifted: dict[str, datetime] = {}
        """Which clients are drifted, and since when: from what they said of it until a check finds them well."""
        self.judged: dict[str, ClientAccuracy] = {}
        """How often the model was right that each client serves, where it says so of enough answers."""
        self._looked_at: dict[str, datetime] = {}
        """When each client last said of both."""
        self.finished: dict[str, datetime] = {}
        """When the last run of each other task finished."""
        self.code: tuple[str, datetime] | None = None
        """What everybody's code is, and since when."""
        self.last_at: datetime | None = None
        """When a device last said something."""

    async def read(self) -> None:
        """What the bus holds of it."""
        wanted = [subjects.wildcard_for(self._bus.fed, kind, task=self.task.id) for kind in TRIGGER_MESSAGES]
        for seen in await self._bus.last_per_subject(events_stream(self._bus.fed), wanted):
            self.hear(seen.message, seen.envelope.time)

    def hear(self, message: Message, at: datetime) -> None:
        match message:
            case DataCounted(client=client):
                self._counted[client] = (message, at)
            case DriftDetected() | DataChecked():
                if not self._hear_look(message, at):
                    return
            case CodePublished(code_version=version):
                if self.code is None or self.code[0] != version:
                    self.code = (version, at)
                return
            case _:
                return
        self.last_at = max(at, self.last_at or at)

    def _hear_look(self, message: DriftDetected | DataChecked, at: datetime) -> bool:
        """A client has looked at its data; whether that is news.

        What was read from the log may come once more, and is older than what is known then.
        """
        if at < self._looked_at.get(message.client, at):
            return False
        self._looked_at[message.client] = at
        if isinstance(message, DriftDetected):
            return self._hear_drift(message.client, at, drifting=True)
        is_news = self._hear_accuracy(message, at)
        return self._hear_drift(message.client, at, drifting=message.drifting) or is_news

    def _hear_drift(self, client: str, at: datetime, *, drifting: bool) -> bool:
        if drifting == (client in self.drifted):
            return False
        if drifting:
            self.drifted[client] = at
        else:
            del self.drifted[client]
        return True

    def _hear_accuracy(self, checked: DataChecked, at: datetime) -> bool:
        """Only the model that serves counts, and only where enough is known of it."""
        before = self.judged.pop(checked.client, None)
        for one in checked.live:
            if one.version == checked.serving and one.labelled >= self.task.table.checks.min_labelled:
                self.judged[checked.client] = ClientAccuracy(one.right / one.labelled, at)
        now = self.judged.get(checked.client)
        return (before and before.accuracy) != (now and now.accuracy)

    def see(self, seen: StoredMessage) -> bool:
        """A run of another task has moved; whether it has finished."""
        move = seen.message
        if not (isinstance(move, Transition) and isinstance(move.facts, RunData)):
            return False
        if move.target != RunState.FINISHED or move.task == self.task.id:
            return False
        before = self.finished.get(move.task)
        self.finished[move.task] = max(seen.envelope.time, before or seen.envelope.time)
        return True

    async def others(self) -> AsyncIterator[StoredMessage]:
        """Moves of all tasks' runs: the last of each, and then as they come."""
        wanted = [subjects.lifecycle(self._bus.fed, "run", "*")]
        async with self._bus.watch(lifecycle_stream(self._bus.fed), wanted) as moves:
            for seen in await self._bus.last_transitions("run"):
                yield seen
            async for seen in moves:
                yield seen

    def came(self, word: str) -> dict[str, int]:
        """How many *word* rows have come of each client: ``labelled`` or ``unlabelled``."""
        return {client: _total_rows(counted, word) for client, (counted, _) in self._counted.items()}

    @property
    def databases(self) -> dict[str, str]:
        """What each client counts them in."""
        return {client: counted.database for client, (counted, _) in self._counted.items()}

    def gained(
        self, word: str, since: Mapping[str, int], databases: Mapping[str, str]
    ) -> dict[str, ClientRowCount]:
        """How many more have come than *since* says, which was counted in *databases*."""
        return {
            client: ClientRowCount(
                _new_rows(counted, word, since.get(client, 0), databases.get(client, "")), at
            )
            for client, (counted, at) in self._counted.items()
        }


def _new_rows(counted: DataCounted, word: str, since: int, database: str) -> int:
    came = _total_rows(counted, word)
    if not database:  # what was counted then may be what an older device held: less of that is not more
        return max(0, came - since)
    is_another = database != counted.database or came < since
    return came if is_another else came - since


def _total_rows(counted: DataCounted, word: str) -> int:
    """What has ever come; of an older device, which does not say so, what it holds."""
    ever, held = {
        "labelled": (counted.labelled_ever, counted.labelled),
        "unlabelled": (counted.unlabelled_ever, counted.unlabelled),
    }[word]
    return held if ever is None else ever
