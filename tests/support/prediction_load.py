"""A load of prediction requests to all clients, with a tally of the replies."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from fedbus.contracts.client import InferenceData
from support.federation import FederationHarness
from support.waiting import eventually


@dataclass
class PredictionTally:
    """The replies to prediction requests."""

    answer_count: int = 0
    errors: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    async def next_versions(self) -> set[int]:
        """Return the model versions that answer requests which are sent from now on."""
        before = len(self.versions) + 1  # one request may be under way
        await eventually(lambda: len(self.versions) >= before + 4)
        return set(self.versions[before:])


@asynccontextmanager
async def send_predictions(fed: FederationHarness) -> AsyncIterator[PredictionTally]:
    """Send prediction requests to all clients, one after the other, until the block ends."""
    tally = PredictionTally()

    async def send_forever(session: aiohttp.ClientSession) -> None:
        while True:
            for endpoint in serving_endpoints(fed):
                try:
                    async with session.post(f"{endpoint}/predict", json={"inputs": [[1, 1, 1]]}) as response:
                        reply = await response.json()
                        assert response.status == 200, reply
                except (aiohttp.ClientError, AssertionError) as error:
                    tally.errors.append(repr(error))
                else:
                    tally.answer_count += 1
                    tally.versions.append(reply["model_version"])
            await asyncio.sleep(0.02)

    async with aiohttp.ClientSession() as session:
        sender = asyncio.ensure_future(send_forever(session))
        try:
            yield tally
        finally:
            sender.cancel()
            await asyncio.wait([sender])


def serving_endpoints(fed: FederationHarness) -> list[str]:
    """The current endpoints of the inference agents, from their transitions."""
    facts = [
        fed.last_transition("inference", thing).facts
        for thing in sorted({one.key for one in fed.transitions_of("inference")})
    ]
    return [one.endpoint for one in facts if isinstance(one, InferenceData) and one.endpoint]
