"""A headless browser, driven over its DevTools protocol."""

import asyncio
import itertools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--no-proxy-server"),
    *("--disable-dev-shm-usage", "--window-size=1400,900", "--remote-debugging-port=0"),
)
_START_S = 60.0
_SEEN_S = 30.0


def program() -> str:
    """The path of the browser; skips the test if there is none."""
    found = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if found is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    return found


class Tab:
    """One window of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of DevTools and wait for its result; events meanwhile are ignored."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                return message.get("result")

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        answer = await self.call("Runtime.evaluate", expression=f"JSON.stringify({expression})")
        value = answer["result"].get("value")
        return None if value is None else json.loads(value)

    async def until(self, expression: str, wanted: Any) -> None:
        """Wait until an expression has a value."""
        seen: Any = None
        try:
            async with asyncio.timeout(_SEEN_S):
                while (seen := await self.evaluate(expression)) != wanted:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{expression} is {seen!r}, not {wanted!r}") from None


class Browser:
    """A running browser that opens windows."""

    def __init__(self, session: aiohttp.ClientSession, port: int, control: Tab) -> None:
        self._session = session
        self._port = port
        self._control = control

    async def open(self, url: str) -> Tab:
        """Open another window, so that earlier ones stay visible."""
        target = await self._control.call("Target.createTarget", url="about:blank", newWindow=True)
        tab = Tab(await _connected(self._session, self._port, f"page/{target['targetId']}"))
        await tab.call("Page.navigate", url=url)
        return tab


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A browser with a temporary profile; all its processes end with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program(),
            *_OPTIONS,
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stderr is not None
            port, path = await _listening(process.stderr)
            async with aiohttp.ClientSession() as session:
                yield Browser(session, port, Tab(await _connected(session, port, path)))
        finally:
            process.terminate()
            await process.communicate()


async def _connected(session: aiohttp.ClientSession, port: int, path: str) -> aiohttp.ClientWebSocketResponse:
    return await session.ws_connect(f"ws://127.0.0.1:{port}/devtools/{path}", max_msg_size=0)


async def _listening(log: asyncio.StreamReader) -> tuple[int, str]:
    """Port and path of DevTools, which the browser prints once it listens."""
    async with asyncio.timeout(_START_S):
        async for line in log:
            if found := re.search(rb"ws://127\.0\.0\.1:(\d+)/devtools/(\S+)", line):
                return int(found[1]), found[2].decode()
    raise AssertionError("the browser ended at its start")
