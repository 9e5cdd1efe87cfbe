"""A steady stream of predictions to every client's endpoint, and an honest count of what came back."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import numpy as np

from fedbus.agents.common.asyncio_tools import wait_within

REQUESTS_PER_S: Final = 20.0
"""To each client."""
LABELLED_SHARE: Final = 0.5
"""The share of requests that say the true answer too, as a user who corrects the device would."""
TIMEOUT_S: Final = 10.0

Samples = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass
class PredictionCounts:
    """What became of the requests, once a client had said that it serves."""

    answered: int = 0
    failed: int = 0
    right: int = 0
    by_model_version: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    by_client: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Answers of a client with a model version."""
    _answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def another(self) -> None:
        """Wait for the next answer."""
        self._answered.clear()
        await self._answered.wait()

    def answer(self, client: str, version: int, *, right: bool) -> None:
        """Count one."""
        self.answered += 1
        self.by_model_version[version] += 1
        self.by_client[client, version] += 1
        self.right += right
        self._answered.set()

    def as_json(self) -> dict[str, Any]:
        versions = {str(version): count for version, count in sorted(self.by_model_version.items())}
        return {
            "answered": self.answered,
            "failed": self.failed,
            "by_model_version": versions,
            "failures": dict(self.failures),
        }


class PredictionLoad:
    """The users of all clients. *endpoints* says where each client serves now; *samples* what they ask."""

    def __init__(self, endpoints: Callable[[], Mapping[str, str]], samples: Mapping[str, Samples]) -> None:
        self._endpoints = endpoints
        self._samples = samples
        self.counts = PredictionCounts()

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[PredictionCounts]:
        """Requests for as long as the block runs; the last ones are waited for."""
        stop = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for client in self._samples:
                group.create_task(self._users_of(client, session, stop), name=f"users of {client}")
            try:
                yield self.counts
            finally:
                stop.set()

    async def _users_of(self, client: str, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        inputs, labels = self._samples[client]
        chosen = random.Random(client)  # noqa: S311 (which sample is asked, not a secret)
        while not stop.is_set():
            if endpoint := self._endpoints().get(client):
                at = chosen.randrange(len(inputs))
                label = int(labels[at]) if chosen.random() < LABELLED_SHARE else None
                asking = (session, client, endpoint, inputs[at], int(labels[at]))
                await self._ask(*asking, told=label is not None)
            with_pause = chosen.uniform(0.5, 1.5) / REQUESTS_PER_S
            try:
                await wait_within(with_pause, stop.wait())
            except TimeoutError:
                continue

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        client: str,
        endpoint: str,
        sample: np.ndarray[Any, Any],
        truth: int,
        *,
        told: bool,
    ) -> None:
        body: dict[str, Any] = {"inputs": [sample.tolist()]}
        if told:
            body["labels"] = [truth]
        try:
            async with session.post(f"{endpoint}/predict", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    self._failed(f"{response.status}: {answer.get('error', answer)}")
                    return
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._failed(type(error).__name__)
            return
        self.counts.answer(client, int(answer["model_version"]), right=answer["outputs"] == [truth])

    def _failed(self, reason: str) -> None:
        self.counts.failed += 1
        self.counts.failures[reason[:120]] += 1
