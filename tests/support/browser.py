"""A headless Chromium for many tests, controlled over the DevTools protocol."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp

from support.waiting import ConditionNotMet, eventually

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
OPTIONS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup,SpareRendererForSitePerProcess",  # unused renderers
    "--no-first-run",
    "--no-startup-window",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
LISTENING: Final = "DevTools listening on "


CODES: Final = {" ": "Space"}
VIRTUAL_KEYS: Final = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32} | {
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}
"""Windows virtual key codes, by which the browser knows the function of a key."""


def find_chromium() -> str | None:
    """Find the browser; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser process for many tests. It starts at first use, and again after a crash."""

    def __init__(self, new_profile: Callable[[], Path]) -> None:
        self._new_profile = new_profile
        self._process: subprocess.Popen[str] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """The address of its DevTools."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        return self._url

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        program = find_chromium()
        assert program, "Chromium is not installed"
        command = (program, *OPTIONS, f"--user-data-dir={self._new_profile()}")
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr
        with self._process.stderr as lines:  # closed afterwards: Chromium ignores SIGPIPE
            output = []
            for line in lines:
                if line.startswith(LISTENING):
                    self._url = line.removeprefix(LISTENING).strip()
                    return
                output.append(line)
        raise AssertionError(f"Chromium did not start: {''.join(output)}")


class DevTools:
    """A connection to a target of DevTools: the browser, or a page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, session: aiohttp.ClientSession, url: str) -> AsyncIterator[Self]:
        """Connect until the block ends."""
        async with session.ws_connect(url, max_msg_size=0) as socket:
            connection = cls(socket)
            reader = asyncio.ensure_future(connection._read_events())
            try:
                yield connection
            finally:
                reader.cancel()
                with suppress(asyncio.CancelledError):
                    await reader

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._replies[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        reply = await asyncio.wait_for(self._replies[number], 60)
        assert "error" not in reply, f"{method}: {reply['error']}"
        result: dict[str, Any] = reply["result"]
        return result

    async def _read_events(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                if not (reply := self._replies.pop(event["id"])).done():
                    reply.set_result(event)
            else:
                self._on_event(event["method"], event["params"])
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(aiohttp.ClientConnectionError("Chromium has closed the connection"))

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        """Handle an event of the target."""


class BrowserPage(DevTools):
    """One tab. *errors* has its exceptions, error log entries and violations of the content security policy."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        super().__init__(socket)
        self.errors: list[str] = []

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details.get("text", ""))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
            case "Page.javascriptDialogOpening":
                self.errors.append(f"dialog: {params['message']}")
            case _:
                pass

    async def evaluate(self, script: str) -> Any:
        """Evaluate *script* in the page, and await a promise."""
        reply = await self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)

    async def wait_until(self, script: str, *, within_s: float = 60.0) -> None:
        """Wait until *script* is true in the page."""

        async def is_true() -> bool:
            return bool(await self.evaluate(f"Boolean({script})"))

        try:
            await eventually(is_true, within_s=within_s)
        except ConditionNotMet:
            text = await self.evaluate("document.body.innerText.slice(0, 2000)")
            detail = f"{script}\npage: {text}\nerrors: {self.errors}"
            raise ConditionNotMet(within_s, detail) from None

    async def text(self, selector: str = "body") -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def click(self, selector: str) -> None:
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    async def press(self, key: str) -> None:
        """Press and release a key in the focused element."""
        await self.send_key("keyDown", key)
        await self.send_key("keyUp", key)

    async def send_key(self, event_type: str, key: str) -> None:
        """Send one key event, ``keyDown`` or ``keyUp``."""
        params: dict[str, Any] = {"key": key, "code": CODES.get(key, key)}
        params |= {"windowsVirtualKeyCode": VIRTUAL_KEYS[key]} if key in VIRTUAL_KEYS else {}
        if event_type == "keyDown" and (text := {"Enter": "\r", " ": " "}.get(key)):
            params["text"] = text
        await self.send("Input.dispatchKeyEvent", type=event_type, **params)

    async def set_viewport(self, *, width: int = 1360, height: int = 860, is_dark: bool = False) -> None:
        """Set the size of the page, and the light or dark color scheme."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 700,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, file: Path) -> None:
        await self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        reply = await self.send("Page.captureScreenshot", format="png")
        await asyncio.to_thread(_write, file, base64.b64decode(reply["data"]))


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@asynccontextmanager
async def open_tab(chromium: Chromium) -> AsyncIterator[BrowserPage]:
    """Open an empty tab until the block ends. It shares no cookie, storage or cache with other tabs."""
    try:
        async with aiohttp.ClientSession() as session, DevTools.connect(session, chromium.url) as browser:
            context = await browser.send("Target.createBrowserContext")
            try:
                tab = await browser.send("Target.createTarget", url="about:blank", **context)
                url = urlsplit(chromium.url)._replace(path=f"/devtools/page/{tab['targetId']}").geturl()
                async with BrowserPage.connect(session, url) as page:
                    for domain in ("Page", "Runtime", "Log"):
                        await page.send(f"{domain}.enable")
                    yield page
            finally:
                await browser.send("Target.disposeBrowserContext", **context)
    except (aiohttp.ClientConnectionError, TimeoutError):
        chromium.kill()  # it has crashed or hangs: the next tab gets another process
        raise
