"""The users of all clients: they ask for predictions all the while, and remember what became of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from fedbus.contracts.client import InferenceData
from support.federation import FederationHarness


@dataclass
class PredictionTally:
    """What the users of all clients were answered."""

    answer_count: int = 0
    errors: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@asynccontextmanager
async def send_predictions(fed: FederationHarness) -> AsyncIterator[PredictionTally]:
    """Predictions are asked for, of every client in turn, for as long as the block runs."""
    asked = PredictionTally()

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            for endpoint in serving_endpoints(fed):
                try:
                    async with session.post(f"{endpoint}/predict", json={"inputs": [[1, 1, 1]]}) as answer:
                        said = await answer.json()
                        assert answer.status == 200, said
                except (aiohttp.ClientError, AssertionError) as error:
                    asked.errors.append(repr(error))
                else:
                    asked.answer_count += 1
                    asked.versions.append(said["model_version"])
            await asyncio.sleep(0.02)

    async with aiohttp.ClientSession() as session:
        asking = asyncio.ensure_future(ask(session))
        try:
            yield asked
        finally:
            asking.cancel()
            await asyncio.wait([asking])


def serving_endpoints(fed: FederationHarness) -> list[str]:
    """Where predictions are answered now, as the inference agents say themselves."""
    facts = [
        fed.last_transition("inference", thing).facts
        for thing in sorted({one.thing for one in fed.transitions_of("inference")})
    ]
    return [one.endpoint for one in facts if isinstance(one, InferenceData) and one.endpoint]
