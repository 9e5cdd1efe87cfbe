"""A real browser without a window, driven over the DevTools protocol."""

import asyncio
import base64
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

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
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


CODES: Final = {" ": "Space"}
VIRTUAL_KEYS: Final = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32} | {
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}
"""What Windows calls each key, which is how the browser knows what a key does."""


def find_chromium() -> str | None:
    """Where the browser is; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class BrowserPage:
    """One tab. What it complains of is kept: errors, and what the content policy forbade."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.errors: list[str] = []

    async def read_events(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                if not (answer := self._answers.pop(told["id"])).done():
                    answer.set_result(told)
            else:
                self._on_event(told["method"], told["params"])

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details.get("text", ""))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
            case "Page.javascriptDialogOpening":
                self.errors.append(f"a dialog: {params['message']}")

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        told = await asyncio.wait_for(self._answers[number], 60)
        assert "error" not in told, f"{method}: {told['error']}"
        result: dict[str, Any] = told["result"]
        return result

    async def evaluate(self, script: str) -> Any:
        """The value of *script*, in the page; promises are waited for."""
        told = await self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)

    async def wait_until(self, script: str, *, within_s: float = 60.0) -> None:
        """Wait until *script* is true in the page."""

        async def it_is() -> bool:
            return bool(await self.evaluate(f"Boolean({script})"))

        try:
            await eventually(it_is, within_s=within_s)
        except ConditionNotMet:
            text = await self.evaluate("document.body.innerText.slice(0, 2000)")
            detail = f"{script}\nthe page: {text}\nits errors: {self.errors}"
            raise ConditionNotMet(within_s, detail) from None

    async def text(self, selector: str = "body") -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def click(self, selector: str) -> None:
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    async def press(self, key: str) -> None:
        """A key of the keyboard, down and up again, to whatever has the focus."""
        await self.send_key("keyDown", key)
        await self.send_key("keyUp", key)

    async def send_key(self, what: str, key: str) -> None:
        """One half of it: ``keyDown`` or ``keyUp``."""
        told: dict[str, Any] = {"key": key, "code": CODES.get(key, key)}
        told |= {"windowsVirtualKeyCode": VIRTUAL_KEYS[key]} if key in VIRTUAL_KEYS else {}
        if what == "keyDown" and (text := {"Enter": "\r", " ": " "}.get(key)):
            told["text"] = text
        await self.send("Input.dispatchKeyEvent", type=what, **told)

    async def set_viewport(self, *, width: int = 1360, height: int = 860, is_dark: bool = False) -> None:
        """Be so large, and light or dark."""
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
        shot = await self.send("Page.captureScreenshot", format="png")
        await asyncio.to_thread(_write, file, base64.b64decode(shot["data"]))


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@asynccontextmanager
async def run_chromium(profile: Path) -> AsyncIterator[BrowserPage]:
    """A browser with one empty tab, for as long as the block runs."""
    program = find_chromium()
    assert program, "there is no Chromium"
    process = await asyncio.create_subprocess_exec(
        program,
        *OPTIONS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    port = profile / "DevToolsActivePort"
    try:
        await eventually(lambda: port.exists() and len(port.read_text().splitlines()) > 1, within_s=60)
        debugger = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{debugger}/json") as answer:
                tab = next(one for one in await answer.json() if one["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = BrowserPage(socket)
                listening = asyncio.ensure_future(page.read_events())
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                try:
                    yield page
                finally:
                    listening.cancel()
                    with suppress(asyncio.CancelledError):
                        await listening
    finally:
        process.terminate()
        await process.wait()
