"""A whole federation in processes of its own, to kill parts of."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.plugs import Site, site_up


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with site_up(tmp_path) as site:
        yield site
