"""The transition log of a simulated fleet: one line for each transition, the same bytes for the same seed."""

import hashlib
import json
from collections import Counter
from datetime import UTC, datetime
from typing import IO, Any

import msgpack

from fedbus.bus.memory.stream import StoredRecord

LIFE: str = ".life."


class TransitionLog:
    """Counts and records stored messages; writes the lines to *file*, if there is one."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self.messages = 0
        self.transitions: Counter[tuple[str, str]] = Counter()
        self.current_run = ""
        self.trainings: dict[str, tuple[int, int]] = {}
        """The trainings of each run, and how many of them failed."""
        self._file = file
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def on_stored(self, record: StoredRecord) -> None:
        """Record a message of any stream."""
        self.messages += 1
        if LIFE in record.subject:
            self._record_transition(record)

    def _record_transition(self, record: StoredRecord) -> None:
        _, _, _, kind, key = record.subject.split(".", 4)
        body: dict[str, Any] = msgpack.unpackb(record.data, timestamp=3)
        self.transitions[kind, body["target"]] += 1
        if kind == "run":
            self.current_run = key
        facts, headers = body["facts"], record.headers or {}
        if kind == "server" and facts.get("run"):
            self.trainings[facts["run"]] = facts["trainings"], facts["failures"]
        line = json.dumps(
            {
                "time": datetime.fromtimestamp(record.time_ns / 1e9, UTC).isoformat(timespec="microseconds"),
                "sequence": record.sequence,
                "kind": kind,
                "entity": key,
                "event": body["event"],
                "source": body["source"],
                "target": body["target"],
                "reason": body["reason"],
                "run": facts.get("run"),
                "deadline": body["deadline"].isoformat() if body["deadline"] else None,
                "id": headers.get("ce-id"),
                "cause": headers.get("ce-causationid", ""),
                "sent_by": headers.get("ce-source"),
                "body_sha256": hashlib.sha256(record.data).hexdigest(),
            }
        )
        self._digest.update(line.encode())
        self._digest.update(b"\n")
        if self._file is not None:
            self._file.write(line + "\n")
