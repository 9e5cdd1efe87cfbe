"""A server manager whose models lie in S3: what it does where the S3 does not let it in, or is away."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eventually
from support.federation import Federation
from support.seaweed import road, seaweed

from fedbus.agents.server_manager import ServerManager
from fedbus.app.embedded_s3 import EmbeddedS3
from fedbus.contracts.server import ServerState
from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.models import ModelStore, open_store


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


def manager_with(fed: Federation, url: str) -> Any:
    async def run(stop: asyncio.Event) -> None:
        async with fed.site.bus("server-manager") as bus:
            store = open_store(url, fed.site.task.id, patience_s=0.2)
            await ServerManager(bus, fed.site.task, store).run(stop)

    return run


async def test_where_the_s3_lets_it_in_no_further_it_says_so_and_begins_no_model(
    fed: Federation, s3_server: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "credentials"
    wrong.write_text("[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n")
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(wrong))
    async with fed.agent(manager_with(fed, s3_server.store_url)):
        told = await fed.happens("server", "store_unavailable")
        assert "lets us in no further" in told.reason
        assert "hush" not in told.reason
        assert told.target == ServerState.MODEL_INIT

        monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3_server.credentials))
        store = open_store(s3_server.store_url, fed.site.task.id)
        await eventually(lambda: _is_prepared(store))  # it went on asking, and was let in


async def test_an_s3_that_is_away_is_waited_for(
    fed: Federation, s3_server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3_server.credentials))
    async with road(s3_server.port) as way:
        way.close()
        url = f"s3://fedbus/away?endpoint=http://127.0.0.1:{way.port}"
        async with fed.agent(manager_with(fed, url)):
            told = await fed.happens("server", "store_unavailable")
            assert "see that it runs" in told.reason
            way.reopen()
            await eventually(lambda: _is_prepared(open_store(url, fed.site.task.id)))


async def _is_prepared(store: ModelStore) -> bool:
    try:
        return await store.latest() is None
    except StoreUnavailable:
        return False
