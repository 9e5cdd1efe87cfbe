"""A steady load of predictions on every client's endpoint, and the count of its results."""

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
"""Sent to each client."""
LABELLED_SHARE: Final = 0.5
"""The share of requests that contain the label, as when a user corrects the device."""
TIMEOUT_S: Final = 10.0

Samples = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass
class PredictionCounts:
    """The results of the requests to clients that serve a model."""

    answered: int = 0
    failed: int = 0
    correct: int = 0
    by_model_version: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    by_client: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Answers by client and model version."""
    _answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for_answer(self) -> None:
        """Wait for the next answer."""
        self._answered.clear()
        await self._answered.wait()

    def count_answer(self, client: str, version: int, *, is_right: bool) -> None:
        self.answered += 1
        self.by_model_version[version] += 1
        self.by_client[client, version] += 1
        self.correct += is_right
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
    """The users of all clients.

    Args:
        endpoints: Returns the current endpoint of each client that serves.
        samples: The inputs and labels that the users of each client send.

    """

    def __init__(self, endpoints: Callable[[], Mapping[str, str]], samples: Mapping[str, Samples]) -> None:
        self._endpoints = endpoints
        self._samples = samples
        self.counts = PredictionCounts()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[PredictionCounts]:
        """Send requests while the block runs; wait for the last answers."""
        stop = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for client in self._samples:
                group.create_task(self._send_requests(client, session, stop), name=f"users of {client}")
            try:
                yield self.counts
            finally:
                stop.set()

    async def _send_requests(self, client: str, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        inputs, labels = self._samples[client]
        chosen = random.Random(client)  # noqa: S311 (chooses samples, no secret)
        while not stop.is_set():
            if endpoint := self._endpoints().get(client):
                at = chosen.randrange(len(inputs))
                is_labelled = chosen.random() < LABELLED_SHARE
                request = (session, client, endpoint, inputs[at], int(labels[at]))
                await self._predict(*request, is_labelled=is_labelled)
            pause_s = chosen.uniform(0.5, 1.5) / REQUESTS_PER_S
            try:
                await wait_within(pause_s, stop.wait())
            except TimeoutError:
                continue

    async def _predict(
        self,
        session: aiohttp.ClientSession,
        client: str,
        endpoint: str,
        sample: np.ndarray[Any, Any],
        label: int,
        *,
        is_labelled: bool,
    ) -> None:
        body: dict[str, Any] = {"inputs": [sample.tolist()]}
        if is_labelled:
            body["labels"] = [label]
        try:
            async with session.post(f"{endpoint}/predict", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    self._count_failure(f"{response.status}: {answer.get('error', answer)}")
                    return
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._count_failure(type(error).__name__)
            return
        self.counts.count_answer(client, int(answer["model_version"]), is_right=answer["outputs"] == [label])

    def _count_failure(self, reason: str) -> None:
        self.counts.failed += 1
        self.counts.failures[reason[:120]] += 1
