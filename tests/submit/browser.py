"""A page in a headless Chromium, through its DevTools protocol: what it logs, what it asks for, how wide it is."""

import asyncio
import base64
import json
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
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


def look(address: str, *, width: int, dark: bool) -> Look:
    """Open a page in a window of this width, in light or dark."""
    return asyncio.run(_look(address, width, dark))


async def _look(address: str, width: int, dark: bool) -> Look:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
        process = await asyncio.create_subprocess_exec(
            CHROMIUM,
            *words,
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            async for line in process.stderr:
                found = re.search(r"DevTools listening on ws://([^/]+)/", line.decode(errors="replace"))
                if found:
                    return await _seen(found[1], address, width, dark)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    raise AssertionError("Chromium ended before it listened")


async def _seen(host: str, address: str, width: int, dark: bool) -> Look:
    seen, loaded, answers = Look(), asyncio.Event(), {}
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{host}/json/list") as response:
            (tab,) = [one for one in await response.json() if one["type"] == "page"]
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def listen() -> None:
                async for message in socket:
                    said = json.loads(message.data)
                    if "id" in said:
                        answers.pop(said["id"]).set_result(said.get("result", said))
                    _note(seen, said, address)
                    if said.get("method") == "Page.loadEventFired":
                        loaded.set()

            async def ask(method: str, **values: Any) -> Any:
                answers[number := len(seen.messages) + 1000 * len(asked)] = answer = asyncio.Future()
                asked.append(method)
                await socket.send_json({"id": number, "method": method, "params": values})
                return await asyncio.wait_for(answer, 60)

            asked: list[str] = []
            listening = asyncio.create_task(listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await ask(f"{domain}.enable")
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await ask("Emulation.setEmulatedMedia", features=[scheme])
            sizes = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
            await ask("Emulation.setDeviceMetricsOverride", **sizes)
            await ask("Page.navigate", url=address)
            await asyncio.wait_for(loaded.wait(), 60)
            seen.overflow = await _value(ask, "document.documentElement.scrollWidth - innerWidth")
            seen.background = await _value(ask, "getComputedStyle(document.body).backgroundColor")
            shot = await ask("Page.captureScreenshot", captureBeyondViewport=True)
            seen.screenshot = base64.b64decode(shot["data"])
            listening.cancel()
    return seen


async def _value(ask: Any, expression: str) -> Any:
    return (await ask("Runtime.evaluate", expression=expression))["result"]["value"]


def _note(seen: Look, said: dict[str, Any], address: str) -> None:
    """Keep what an event of the browser says."""
    method, values = said.get("method"), said.get("params", {})
    if method == "Runtime.consoleAPICalled":
        seen.messages.append(str([one.get("value") for one in values["args"]]))
    elif method == "Runtime.exceptionThrown":
        seen.messages.append(str(values["exceptionDetails"].get("text")))
    elif method == "Log.entryAdded":
        seen.messages.append(values["entry"]["text"])
    elif method == "Network.requestWillBeSent":
        url = values["request"]["url"]
        if url != address and not url.startswith("data:"):
            seen.requests.append(url)


def screenshot(page: Path, out: Path, *, width: int, dark: bool) -> Look:
    """Look at a file and keep the picture."""
    seen = look(page.absolute().as_uri(), width=width, dark=dark)
    out.write_bytes(seen.screenshot)
    return seen
