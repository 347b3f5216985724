"""A page in a headless Chromium, through its DevTools protocol: what it logs, what it asks for, how wide it is."""

import asyncio
import base64
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Look:
    """What was seen of a page."""

    messages: list[str] = field(default_factory=list)
    """Errors, warnings and everything else on the console."""
    requests: list[str] = field(default_factory=list)
    """Addresses asked for, without the page itself and data in it."""
    overflow: int = 0
    """Pixels by which the page is wider than the window."""
    background: str = ""
    screenshot: bytes = b""
    """PNG of the whole page."""


def look(address: str, windows: Sequence[tuple[int, bool]], *, pictures: bool = False) -> list[Look]:
    """Open a page in windows of a width, each light or dark; ``pictures`` take seconds."""
    return asyncio.run(_look(address, windows, pictures))


async def _look(address: str, windows: Sequence[tuple[int, bool]], pictures: bool) -> list[Look]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM,
            *["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"],
            *["--disable-background-networking", f"--user-data-dir={profile}", "about:blank"],
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            async for line in process.stderr:
                found = re.search(r"DevTools listening on ws://([^/]+)/", line.decode(errors="replace"))
                if found:
                    return await _seen(found[1], address, windows, pictures)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    raise AssertionError("Chromium ended before it listened")


async def _seen(host: str, address: str, windows: Sequence[tuple[int, bool]], pictures: bool) -> list[Look]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{host}/json/list") as response:
            (tab,) = [one for one in await response.json() if one["type"] == "page"]
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            talk = _Talk(socket, address)
            listening = asyncio.create_task(talk.listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await talk.ask(f"{domain}.enable")
            found = [await talk.look(width, dark, pictures) for width, dark in windows]
            listening.cancel()
            return found


class _Talk:
    """What is said to a tab of the browser, and what it answers."""

    def __init__(self, socket: Any, address: str) -> None:
        self._socket, self._address = socket, address
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0
        self._loaded = asyncio.Event()
        self._seen = Look()

    async def listen(self) -> None:
        """Take answers and events until the connection ends."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said.get("result", said))
            elif said["method"] == "Page.loadEventFired":
                self._loaded.set()
            else:
                self._note(said["method"], said["params"])

    async def ask(self, method: str, **values: Any) -> Any:
        """Call a method of the browser's."""
        self._asked += 1
        self._answers[self._asked] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._asked, "method": method, "params": values})
        return await asyncio.wait_for(answer, 60)

    async def look(self, width: int, dark: bool, picture: bool) -> Look:
        """Load the page anew in a window."""
        self._seen = seen = Look()
        self._loaded.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme])
        sizes = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.ask("Emulation.setDeviceMetricsOverride", **sizes)
        await self.ask("Page.navigate", url=self._address)
        await asyncio.wait_for(self._loaded.wait(), 60)
        seen.overflow = await self._value("document.documentElement.scrollWidth - innerWidth")
        seen.background = await self._value("getComputedStyle(document.body).backgroundColor")
        if picture:
            shot = await self.ask("Page.captureScreenshot", captureBeyondViewport=True)
            seen.screenshot = base64.b64decode(shot["data"])
        return seen

    async def _value(self, expression: str) -> Any:
        return (await self.ask("Runtime.evaluate", expression=expression))["result"]["value"]

    def _note(self, method: str, values: dict[str, Any]) -> None:
        """Keep what an event says."""
        if method == "Runtime.consoleAPICalled":
            self._seen.messages.append(str([one.get("value") for one in values["args"]]))
        elif method == "Runtime.exceptionThrown":
            self._seen.messages.append(str(values["exceptionDetails"].get("text")))
        elif method == "Log.entryAdded":
            self._seen.messages.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = values["request"]["url"]
            if url != self._address and not url.startswith("data:"):
                self._seen.requests.append(url)
