"""The shared browser of these tests."""

import aiohttp
import pytest
from support.browser import BrowserPage, Chromium, open_tab

SITE = "http://127.0.0.1/"


async def test_a_crashed_browser_is_started_again(chromium: Chromium) -> None:
    with pytest.raises(aiohttp.ClientConnectionError):
        async with open_tab(chromium) as tab:
            await tab.send("Browser.crash")
    async with open_tab(chromium) as tab:
        assert await tab.evaluate("1 + 1") == 2


async def test_tabs_share_no_cookies(chromium: Chromium) -> None:
    async with open_tab(chromium) as first, open_tab(chromium) as second:
        await first.send("Network.setCookie", name="a", value="b", url=SITE)
        assert [await count_cookies(tab) for tab in (first, second)] == [1, 0]


async def count_cookies(tab: BrowserPage) -> int:
    reply = await tab.send("Network.getCookies", urls=[SITE])
    return len(reply["cookies"])
