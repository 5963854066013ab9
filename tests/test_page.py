"""The page in a real browser, over a module whose answers are scripted."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import cv2
import numpy as np
from aiohttp import web

from browser import browser
from visionedge.web.dashboard import Page

Document = dict[str, Any]
ENGINE = {
    "requested": "auto",
    "effective": "cpu",
    "degraded": False,
    "reason": "x",
    "reasonCode": "no-gpu-build",
}


def camera(name: str, state: str = "live", **facts: Any) -> Document:
    """A camera as /api/v1/cameras gives it."""
    document = {
        "name": name,
        "state": state,
        "fps": 2.0,
        "ageMs": 100.0,
        "lastError": None,
        "width": 64,
        "height": 36,
    }
    return {**document, "since": "2026-01-01T00:00:00.000Z", **facts}


def frame(name: str, sequence: int, labels: tuple[str, ...]) -> Document:
    """A frame object with a box for each label."""
    box = {"left": 0.1, "top": 0.1, "width": 0.2, "height": 0.5}
    found = [{"label": label, "classId": n, "confidence": 0.9, "box": box} for n, label in enumerate(labels)]
    return {"camera": name, "sequence": sequence, "width": 64, "height": 36, "detections": found}


class Module:
    """What the page asks for, below a path; `streams` counts the open streams of frames."""

    def __init__(self, cameras: list[Document]) -> None:
        self.cameras = cameras
        self.status: Document = {
            "engine": ENGINE,
            "version": "0",
            "uptimeSeconds": 5,
            "capacity": None,
            "hub": {},
        }
        seen = [item["name"] for item in cameras if item["ageMs"] is not None]
        self.frames = {name: frame(name, 1, ("person",)) for name in seen}
        self.streams = 0
        self._jpeg = cv2.imencode(".jpg", np.full((36, 64, 3), 90, np.uint8))[1].tobytes()

    def application(self, below: str = "") -> web.Application:
        """All paths, behind a prefix as a reverse proxy has it."""
        app, page = web.Application(), Page()
        app.router.add_get(f"{below}/", self._answering(page.answer))
        app.router.add_get(f"{below}/api/v1/status", self._answering(lambda: web.json_response(self.status)))
        cameras = self._answering(lambda: web.json_response({"cameras": self.cameras}))
        app.router.add_get(f"{below}/api/v1/cameras", cameras)
        app.router.add_get(f"{below}/readyz", self._answering(lambda: web.json_response({})))
        app.router.add_get(f"{below}/api/v1/frames", self._stream)
        app.router.add_get(f"{below}/api/v1/cameras/{{name}}/frame", self._frame)
        app.router.add_get(f"{below}/api/v1/cameras/{{name}}/snapshot.jpg", self._snapshot)
        return app

    def _answering(self, make: Any) -> Any:
        async def handler(_request: web.Request) -> web.Response:
            response: web.Response = make()
            return response

        return handler

    async def _frame(self, request: web.Request) -> web.Response:
        return web.json_response(self.frames[request.match_info["name"]])

    async def _snapshot(self, request: web.Request) -> web.Response:
        number = str(self.frames[request.match_info["name"]]["sequence"])
        headers = {"X-Visionedge-Sequence": number}
        return web.Response(body=self._jpeg, content_type="image/jpeg", headers=headers)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.streams += 1
        try:
            while True:
                for shown in self.frames.values():
                    await response.write(f"data: {json.dumps(shown)}\n\n".encode())
                await asyncio.sleep(0.2)
        finally:
            self.streams -= 1


@asynccontextmanager
async def served(module: Module, below: str = "") -> AsyncIterator[tuple[str, web.AppRunner]]:
    """The module at an address."""
    runner = web.AppRunner(
        module.application(below), access_log=None, shutdown_timeout=0.1, handler_cancellation=True
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}{below}/", runner
    finally:
        await runner.cleanup()


BADGES = """[...document.querySelectorAll('.tile')].map(
    (tile) => ['h2', '.badge'].map((part) => tile.querySelector(part).textContent))"""


def texts(selector: str) -> str:
    """The texts of the elements that are seen."""
    return f"[...document.querySelectorAll('{selector}')].filter(n => n.offsetParent).map(n => n.textContent)"


def test_every_state_has_its_words_and_the_order_is_that_of_the_configuration() -> None:
    """Also after cameras came, went and changed places; a camera that is switched off waits for nothing."""

    async def drive() -> None:
        module = Module([camera("b"), camera("a", "disabled", ageMs=None), camera("c", "frozen")])
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until(BADGES, [["b", "live"], ["a", "disabled"], ["c", "frozen"]])
            await tab.until(texts(".hint"), ["Switched off in the configuration"])
            await tab.until(f"{texts('.view .note')}[0]?.startsWith('Unchanged for ')", True)
            module.cameras = [
                camera("a", "failed", lastError="no route"),
                camera("d", "waiting"),
                camera("b", "ended"),
            ]
            await tab.until(BADGES, [["a", "failed"], ["d", "waiting"], ["b", "ended"]])
            await tab.until(texts(".error"), ["no route"])
            # What was seen when it ended is not there now.
            await tab.until(
                "document.querySelectorAll('.tile')[2].querySelector('.found').offsetParent", None
            )

    asyncio.run(drive())


def test_chips_take_one_line_however_many_labels_there_are() -> None:
    """Those that do not fit are counted, and the tile keeps its height."""

    async def drive() -> None:
        module = Module([camera("dock"), camera("yard"), camera("gate")])
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until(f"{texts('.found li')}.length", 3)
            height = "document.querySelector('.tile').offsetHeight"
            before = await tab.evaluate(height)
            labels = tuple(f"a label of some length {n}" for n in range(9))
            module.frames["dock"] = frame("dock", 2, labels)
            await tab.until(
                "(document.querySelector('.found .more') || {}).textContent?.startsWith('+')", True
            )
            shown = await tab.evaluate(texts(".tile:first-child .found li:not(.more)"))
            [more] = await tab.evaluate(texts(".found .more"))
            assert len(shown) + int(more) == len(labels)
            assert await tab.evaluate(height) == before

    asyncio.run(drive())


def test_no_tile_says_live_when_the_module_does_not_answer() -> None:
    """The picture is an old one then, and each tile says so."""

    async def drive() -> None:
        module = Module([camera("dock"), camera("yard")])
        async with browser() as chromium, served(module) as (url, runner):
            tab = await chromium.open(url)
            await tab.until("tiles.get('dock') && tiles.get('dock').shown > 0", True)
            await runner.cleanup()
            await tab.until(BADGES, [["dock", "no answer"], ["yard", "no answer"]])
            assert all(text.startswith("No connection") for text in await tab.evaluate(texts(".view .note")))

    asyncio.run(drive())


def test_the_page_works_below_the_path_of_a_reverse_proxy() -> None:
    """All that it asks for, and its links, lie below the same path."""

    async def drive() -> None:
        async with browser() as chromium, served(Module([camera("dock")]), "/site/vision") as (url, _):
            tab = await chromium.open(url)
            await tab.until("tiles.get('dock') && tiles.get('dock').shown > 0", True)
            links = await tab.evaluate("[...document.querySelectorAll('footer a')].map(a => a.pathname)")
            assert links == [f"/site/vision/{path}" for path in ("api/v1/status", "metrics", "openapi.json")]

    asyncio.run(drive())


def test_seven_windows_of_a_browser_share_one_stream() -> None:
    """A browser opens six connections to a host; with a stream each, the seventh window would not load."""

    async def drive() -> None:
        module = Module([camera("dock")])
        async with browser() as chromium, served(module) as (url, _):
            tabs = [await chromium.open(url) for _ in range(7)]
            for tab in tabs:
                await tab.until("tiles.get('dock') && tiles.get('dock').shown > 0", True)
            for _ in range(100):
                if module.streams == 1:
                    break
                await asyncio.sleep(0.1)
            assert module.streams == 1
            module.frames["dock"] = frame("dock", 7, ("person",))
            for tab in tabs:
                await tab.until("tiles.get('dock').shown", 7)

    asyncio.run(drive())


def test_the_note_about_the_cpu_is_in_plain_words_and_can_be_hidden() -> None:
    """It is there on every machine without a GPU; hidden once it stays hidden."""

    async def drive() -> None:
        async with browser() as chromium, served(Module([camera("dock")])) as (url, _):
            tab = await chromium.open(url)
            await tab.until(texts(".banner span"), ["This installation has no GPU support."])
            await tab.evaluate("document.querySelector('.banner .hide').click() || null")
            await tab.until(texts(".banner"), [])
            again = await chromium.open(url)
            await again.until(BADGES, [["dock", "live"]])
            assert await again.evaluate(texts(".banner")) == []

    asyncio.run(drive())


def test_captions_are_read_well_on_the_colour_of_every_class() -> None:
    """Contrast 4.5 or more (WCAG), whichever of black and white is taken."""

    async def drive() -> None:
        contrast = """(() => {
          const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
          const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const luminance = (colour) => {
            pen.fillStyle = colour;
            pen.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((value) => linear(value / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          return Math.min(...Array.from({ length: 100 }, (_, id) => {
            const [a, b] = [luminance(colourOf(id)), luminance(inkOf(id))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
          }));
        })()"""
        async with browser() as chromium, served(Module([camera("dock")])) as (url, _):
            tab = await chromium.open(url)
            await tab.until("typeof inkOf", "function")
            assert await tab.evaluate(contrast) >= 4.5

    asyncio.run(drive())
