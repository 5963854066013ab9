"""The page in a real browser, over a module whose answers are scripted."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import cv2
import numpy as np
from aiohttp import web

from browser import browser
from visionedge.scene.events import EVENT_TYPES
from visionedge.web.handlers import DashboardPage

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
    document: Document = {
        "name": name,
        "state": state,
        "fps": 2.0,
        "ageMs": 100.0,
        "lastError": None,
        "width": 64,
        "height": 36,
        "zones": {},
        "lines": {},
    }
    return {**document, "since": "2026-01-01T00:00:00.000Z", **facts}


def frame(name: str, sequence: int, labels: tuple[str, ...]) -> Document:
    """A frame object with a box for each label."""
    box = {"left": 0.1, "top": 0.1, "width": 0.2, "height": 0.5}
    found = [
        {"label": label, "classId": n, "confidence": 0.9, "box": box, "trackId": 100 + n}
        for n, label in enumerate(labels)
    ]
    at = f"2026-11-30T10:00:{sequence % 60:02}.000Z"
    return {"camera": name, "sequence": sequence, "capturedAt": at, "detections": found}


SQUARE = [[0.1, 0.1], [0.1, 0.9], [0.9, 0.9], [0.9, 0.1]]
DOOR = [[0.5, 0.2], [0.5, 0.8]]


def event(number: int, kind: str = "zone-entered", camera: str = "dock", **keys: Any) -> Document:
    """A scene event, one second later for each number."""
    at = f"2026-11-30T10:{number // 60:02}:{number % 60:02}.000Z"
    where = {"line": "door"} if kind == "line-crossed" else {"zone": "queue"}
    return {
        "id": f"{number:032x}",
        "camera": camera,
        "type": kind,
        **where,
        "label": "person",
        "at": at,
        **keys,
    }


def _jpeg(width: int, height: int) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 90, np.uint8))[1].tobytes()


class FakePageBackend:
    """The answers that the page needs, below a path.

    `events` are in the log; `live_events` are sent once. `streams` counts the open streams of frames,
    `snapshots` the requested pictures by camera. The state is not answered while `answers` is not set.
    """

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
        self.answers = asyncio.Event()
        self.answers.set()
        self.events: list[Document] = []
        self.live_events: list[Document] = []
        self.scene: Document = {"tracks": [], "zones": {}, "lines": {}}
        self.streams = 0
        self.snapshots: Counter[str] = Counter()
        self._jpegs = {item["name"]: _jpeg(item["width"], item["height"]) for item in cameras}

    def application(self, below: str = "") -> web.Application:
        """All paths, below a prefix as with a reverse proxy."""
        app, page = web.Application(), DashboardPage()
        app.router.add_get(f"{below}/", self._answering(page.answer))
        app.router.add_get(f"{below}/api/v1/status", self._status)
        cameras = self._answering(lambda: web.json_response({"cameras": self.cameras}))
        app.router.add_get(f"{below}/api/v1/cameras", cameras)
        app.router.add_get(f"{below}/readyz", self._answering(lambda: web.json_response({})))
        app.router.add_get(f"{below}/api/v1/frames", self._stream)
        app.router.add_get(f"{below}/api/v1/cameras/{{name}}/frame", self._frame)
        scene = self._answering(lambda: web.json_response(self.scene))
        app.router.add_get(f"{below}/api/v1/cameras/{{name}}/scene", scene)
        log = self._answering(lambda: web.json_response({"events": self.events}))
        app.router.add_get(f"{below}/api/v1/events", log)
        app.router.add_get(f"{below}/api/v1/cameras/{{name}}/snapshot.jpg", self._snapshot)
        return app

    def _answering(self, make: Any) -> Any:
        async def handler(_request: web.Request) -> web.Response:
            response: web.Response = make()
            return response

        return handler

    async def _status(self, _request: web.Request) -> web.Response:
        await self.answers.wait()
        return web.json_response(self.status)

    async def _frame(self, request: web.Request) -> web.Response:
        return web.json_response(self.frames[request.match_info["name"]])

    async def _snapshot(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.snapshots[name] += 1
        headers = {"X-Visionedge-Sequence": str(self.frames[name]["sequence"])}
        return web.Response(body=self._jpegs[name], content_type="image/jpeg", headers=headers)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.streams += 1
        try:
            while True:
                for shown in self.frames.values():
                    await response.write(f"data: {json.dumps(shown)}\n\n".encode())
                while self.live_events and request.query.get("events"):
                    event = self.live_events.pop(0)
                    text = f"event: scene\nid: {event['id']}\ndata: {json.dumps(event)}\n\n"
                    await response.write(text.encode())
                await asyncio.sleep(0.2)
        finally:
            self.streams -= 1


@asynccontextmanager
async def served(module: FakePageBackend, below: str = "") -> AsyncIterator[tuple[str, web.AppRunner]]:
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


DASH = "\u2013"

BADGES = """[...document.querySelectorAll('.tile')].map(
    (tile) => ['h2', '.badge'].map((part) => tile.querySelector(part).textContent))"""


def texts(selector: str) -> str:
    """The texts of the elements that are seen."""
    return f"[...document.querySelectorAll('{selector}')].filter(n => n.offsetParent).map(n => n.textContent)"


def test_every_state_has_a_text_and_cameras_are_in_configuration_order() -> None:
    """Also after cameras came, went and changed places; a camera that is switched off waits for nothing."""

    async def scenario() -> None:
        module = FakePageBackend([camera("b"), camera("a", "disabled", ageMs=None), camera("c", "frozen")])
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

    asyncio.run(scenario())


def test_an_ended_camera_shows_nothing_as_current_and_says_how_to_play_it_again() -> None:
    """Its last picture stays, with the time since; labels, rate and age are hidden until it is live again."""

    async def scenario() -> None:
        module = FakePageBackend([camera("clip")])
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until(texts(".found li"), ["person"])
            await tab.until(texts(".numbers"), ["2.0 fps · 100 ms old"])
            module.cameras = [camera("clip", "ended", fps=0.0, ageMs=540_000.0)]
            await tab.until(BADGES, [["clip", "ended"]])
            assert await tab.evaluate(texts(".found li")) == []
            assert await tab.evaluate(texts(".numbers")) == [""]
            [note] = await tab.evaluate(texts(".view .note"))
            assert note.startswith("Ended ")
            [advice] = await tab.evaluate(texts(".advice"))
            assert "restartCamera" in advice
            assert "loop: true" in advice
            assert await tab.evaluate("document.querySelector('.advice').scrollHeight <= 34"), "two lines"
            module.cameras = [camera("clip", "connecting", fps=0.0, ageMs=None)]
            await tab.until(BADGES, [["clip", "connecting"]])
            assert await tab.evaluate(texts(".found li, .advice")) == []
            module.cameras = [camera("clip")]
            await tab.until(texts(".found li"), ["person"])
            assert await tab.evaluate(texts(".advice, .view .note")) == []

    asyncio.run(scenario())


def test_label_chips_take_one_line_for_any_number_of_labels() -> None:
    """Those that do not fit are counted, and the tile keeps its height."""

    async def scenario() -> None:
        module = FakePageBackend([camera("dock"), camera("yard"), camera("gate")])
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

    asyncio.run(scenario())


def test_no_tile_shows_live_if_the_module_does_not_answer() -> None:
    """The picture is old then, and each tile shows it."""

    async def scenario() -> None:
        module = FakePageBackend([camera("dock"), camera("yard")])
        async with browser() as chromium, served(module) as (url, runner):
            tab = await chromium.open(url)
            await tab.until("tiles.get('dock') && tiles.get('dock').shown > 0", True)
            await runner.cleanup()
            await tab.until(BADGES, [["dock", "no answer"], ["yard", "no answer"]])
            assert all(text.startswith("No connection") for text in await tab.evaluate(texts(".view .note")))

    asyncio.run(scenario())


def test_the_page_works_below_the_path_of_a_reverse_proxy() -> None:
    """All requests and links of the page are below the same path."""

    async def scenario() -> None:
        async with (
            browser() as chromium,
            served(FakePageBackend([camera("dock")]), "/site/vision") as (url, _),
        ):
            tab = await chromium.open(url)
            await tab.until("tiles.get('dock') && tiles.get('dock').shown > 0", True)
            links = await tab.evaluate("[...document.querySelectorAll('footer a')].map(a => a.pathname)")
            assert links == [f"/site/vision/{path}" for path in ("api/v1/status", "metrics", "openapi.json")]

    asyncio.run(scenario())


def test_seven_windows_of_a_browser_share_one_stream() -> None:
    """A browser opens six connections to a host; with a stream each, the seventh window would not load."""

    async def scenario() -> None:
        module = FakePageBackend([camera("dock")])
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

    asyncio.run(scenario())


def test_the_note_about_the_cpu_is_readable_and_can_be_hidden() -> None:
    """It is shown on every machine without a GPU; once hidden it stays hidden."""

    async def scenario() -> None:
        async with browser() as chromium, served(FakePageBackend([camera("dock")])) as (url, _):
            tab = await chromium.open(url)
            await tab.until(texts(".banner span"), ["This installation has no GPU support."])
            await tab.evaluate("document.querySelector('.banner .hide').click() || null")
            await tab.until(texts(".banner"), [])
            again = await chromium.open(url)
            await again.until(BADGES, [["dock", "live"]])
            assert await again.evaluate(texts(".banner")) == []

    asyncio.run(scenario())


def test_the_page_says_that_pictures_leave_this_device() -> None:
    """While a server computes, and to which one."""
    sentence = "pictures leave this device: https://gpu.example"
    remote = {"sentence": sentence, "replicas": []}

    async def scenario() -> None:
        backend = FakePageBackend([camera("dock")])
        used = {"requested": "remote", "effective": "remote", "reasonCode": "ok", "remote": remote}
        backend.status["engine"] = {**ENGINE, **used}
        async with browser() as chromium, served(backend) as (url, _):
            tab = await chromium.open(url)
            await tab.until(texts(".banner strong, .banner span"), ["Computing on a server", sentence])
            await tab.until("document.getElementById('device').textContent", "remote server→remote server")

    asyncio.run(scenario())


def test_the_engine_dialog_lists_what_every_engine_gave_and_why_it_is_not_used() -> None:
    """With a dash for what was not measured."""

    async def scenario() -> None:
        module = FakePageBackend([camera("dock")])
        used = {"runtime": "openvino", "precision": "bf16", "options": "plain", "ms": 9.04, "note": ""}
        used |= {"framesPerSecond": 203.0, "timesAsFast": 1.714}
        lost = {"runtime": "onnxruntime", "precision": "fp32", "options": "CUDA graphs", "ms": None}
        lost |= {"framesPerSecond": None, "timesAsFast": None, "note": "its results differ"}
        module.status["engine"] = ENGINE | {
            "runtime": "openvino",
            "precision": {"precision": "bf16", "reason": "bf16 was the fastest"},
            "plan": {"lanes": 2, "buckets": [1], "reason": "two lanes were the fastest"},
            "candidates": [used, lost],
        }
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until(BADGES, [["dock", "live"]])
            await tab.evaluate("document.getElementById('engine-open').click()")
            await tab.until(
                texts(".candidates tbody tr > *"),
                [
                    *("openvino bf16", "9.0", "203.0", "1.71", "in use"),
                    *("onnxruntime fp32 with CUDA graphs", DASH, DASH, DASH, "its results differ"),
                ],
            )
            assert (await tab.evaluate(texts("#engine .verdict"))) == [
                "CPU, openvino bf16, 2 lanes, batches of 1"
            ]
            del module.status["engine"]["precision"]
            await tab.evaluate("document.getElementById('engine-close').click()")
            await tab.evaluate("document.getElementById('engine-open').click()")
            await tab.until(texts("#engine-body p"), ["x"])

    asyncio.run(scenario())


def test_captions_are_readable_on_every_class_colour() -> None:
    """Contrast 4.5 or more (WCAG), whichever of black and white is taken."""

    async def scenario() -> None:
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
            const [a, b] = [luminance(colourOf(id)), luminance(textColourOf(id))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
          }));
        })()"""
        async with browser() as chromium, served(FakePageBackend([camera("dock")])) as (url, _):
            tab = await chromium.open(url)
            await tab.until("typeof textColourOf", "function")
            assert await tab.evaluate(contrast) >= 4.5

    asyncio.run(scenario())


def test_a_lost_camera_shows_the_time_of_the_next_attempt() -> None:
    """In place of its rate; during an attempt the page shows that, and a live camera shows neither."""

    async def scenario() -> None:
        module = FakePageBackend(
            [
                camera("gate", "failed", ageMs=None, nextTrySeconds=11.3),
                camera("yard", "reconnecting", nextTrySeconds=None),
                camera("dock", nextTrySeconds=None),
            ]
        )
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            rates = texts(".numbers b")
            await tab.until(rates, ["next try in 12 s", "trying now", "2.0 fps"])
            module.cameras = [camera("gate"), camera("yard", "reconnecting", nextTrySeconds=0.0)]
            await tab.until(rates, ["2.0 fps", "next try in 1 s"])

    asyncio.run(scenario())


def test_the_header_never_shows_more_analysed_than_requested_frames() -> None:
    """Both numbers are of one window of time; where nothing limits there is only the rate of now."""

    async def scenario() -> None:
        module = FakePageBackend([camera("dock", fps=11.5), camera("yard", fps=4.0)])
        seen = {"deliveredPerSecond": 11.2, "demandedPerSecond": 15.0, "sentence": "x"}
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until(texts("#rate"), ["15.5 fps"])
            module.status["capacity"] = {**seen, "bottleneck": "engine"}
            await tab.until(texts("#rate"), ["11.2 of 15.0 fps"])
            module.status["capacity"] = {**seen, "bottleneck": "none"}
            await tab.until(texts("#rate"), ["15.5 fps"])

    asyncio.run(scenario())


def test_camera_names_are_fully_visible_with_sixteen_tiles() -> None:
    """Its rate and its age have their own line and are fully visible, too."""

    async def scenario() -> None:
        names = [f"assembly-north-{number:02}" for number in range(16)]
        module = FakePageBackend(
            [camera(name, "reconnecting", nextTrySeconds=29.5, ageMs=3.6e6) for name in names]
        )
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("document.querySelectorAll('.tile').length", 16)
            cut = """[...document.querySelectorAll('.head h2, .numbers')]
                .filter(node => node.scrollWidth > node.clientWidth).map(node => node.textContent)"""
            await tab.until(texts(".numbers"), ["next try in 30 s · 1 h 0 min old"] * 16)
            assert await tab.evaluate(cut) == []

    asyncio.run(scenario())


def test_captions_do_not_overlap_and_stay_within_the_picture() -> None:
    """Also of boxes that are equal, of a crowd in a corner, and of a name that is longer than its box.

    A caption names the attributes of its object.
    """

    async def scenario() -> None:
        boxes = [
            {"left": 0.4, "top": 0.4, "width": 0.2, "height": 0.3},
            {"left": 0.4, "top": 0.4, "width": 0.2, "height": 0.3},
            {"left": 0.41, "top": 0.41, "width": 0.2, "height": 0.3},
            {"left": 0.95, "top": 0.0, "width": 0.05, "height": 1.0},
            {"left": 0.95, "top": 0.0, "width": 0.05, "height": 1.0},
            {"left": 0.0, "top": 0.9, "width": 0.1, "height": 0.1},
            *[{"left": 0.9, "top": 0.02, "width": 0.05, "height": 0.06}] * 2,
        ]
        labels = ("bus", "truck", "train", "traffic light", "fire hydrant", "person", *("car",) * 2)
        found = [
            {"label": label, "classId": n, "confidence": 0.9, "box": box}
            for n, (label, box) in enumerate(zip(labels, boxes, strict=True))
        ]
        found[5]["attributes"] = {"helmet": "no"}
        placed = f"""(() => {{
          const place = {{ x: 100, y: 0, w: 600, h: 450 }}, captions = [];
          const tile = tiles.get("dock"), pen = document.createElement("canvas").getContext("2d");
          for (const found of {json.dumps(found)}) tile.placeCaption(pen, place, found, 1, captions);
          return captions.map(({{ left, top, w, tall, text }}) => [left, top, left + w, top + tall, text]);
        }})()"""
        async with browser() as chromium, served(FakePageBackend([camera("dock")])) as (url, _):
            tab = await chromium.open(url)
            await tab.until(BADGES, [["dock", "live"]])
            captions = await tab.evaluate(placed)
        assert len(captions) == len(found)
        assert [text for *_, text in captions][4:6] == ["fire hydrant 90%", "person 90% helmet: no"]
        for left, top, right, bottom, _ in captions:
            assert (left >= 100, top >= 0, right <= 700, bottom <= 450) == (True,) * 4
        for one, other in itertools.combinations(captions, 2):
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)

    asyncio.run(scenario())


def test_a_tall_picture_gets_a_tall_tile_and_is_large_in_it() -> None:
    """As tall as two others, so that the rows stay aligned."""

    async def scenario() -> None:
        module = FakePageBackend(
            [camera("door", width=480, height=848), *map(camera, ("a", "b", "c", "d", "e"))]
        )
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("tiles.get('door') && tiles.get('door').shown > 0", True)
            sizes = "(({ clientWidth, clientHeight }) => [clientWidth, clientHeight])(tiles.get('%s').%s)"
            width, height = await tab.evaluate(sizes % ("door", "view"))
            assert height > width
            [_, tall], [_, usual] = [await tab.evaluate(sizes % (name, "node")) for name in ("door", "a")]
            assert 2 * usual <= tall <= 2 * usual + 40
            # The canvas follows, so the picture is as high as the tile's view.
            drawn = "tiles.get('door').canvas.height / Math.min(devicePixelRatio, 2)"
            assert await tab.evaluate(drawn) == height

    asyncio.run(scenario())


def test_only_tiles_in_or_near_the_viewport_fetch_pictures() -> None:
    """Tiles just below the edge have their picture already; those far below request none until then."""

    async def scenario() -> None:
        names = [f"camera-{number:02}" for number in range(40)]
        module = FakePageBackend([camera(name) for name in names])
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("tiles.size", 40)
            above = "[...tiles.values()].filter(t => t.node.getBoundingClientRect().top < innerHeight * %s)"
            near = await tab.evaluate(f"{above % 1.5}.map(tile => tile.name)")
            seen = await tab.evaluate(f"{above % 1}.map(tile => tile.name)")
            reached = await tab.evaluate(f"{above % 1.7}.map(tile => tile.name)")
            assert len(seen) < len(near) <= len(reached) < 40
            await tab.until(f"{above % 1.5}.every(tile => tile.shown > 0)", True)
            # The tile that waited longest comes first: second pictures follow the first ones of all tiles.
            module.frames = {name: frame(name, 2, ("person",)) for name in names}
            await tab.until(f"{above % 1.5}.every(tile => tile.shown === 2)", True)
            assert {name for name in names if module.snapshots[name]} <= set(reached)
            await tab.evaluate("tiles.get('camera-39').node.scrollIntoView() || null")
            await tab.until("tiles.get('camera-39').shown", 2)

    asyncio.run(scenario())


def test_the_page_layout_is_stable_while_detections_and_states_change() -> None:
    """The score of layout shifts (CLS), as the browser counts them, stays below 0.1 from the start on."""

    async def scenario() -> None:
        names = [f"camera-{number:02}" for number in range(16)]
        module = FakePageBackend([camera(name) for name in names])
        module.answers.clear()  # the page is there before the first answer is
        watch = """(() => {
          window.shifts = [];
          const note = ({ value, sources }) =>
            window.shifts.push({ value, of: sources.map(({ node }) => node && (node.className || node.id)) });
          new PerformanceObserver((list) => list.getEntries().forEach(note))
            .observe({ type: "layout-shift", buffered: true });
          return PerformanceObserver.supportedEntryTypes.includes("layout-shift");
        })()"""
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("performance.getEntriesByType('paint').length > 0", True)
            module.answers.set()
            await tab.until("tiles.size", 16)
            assert await tab.evaluate(watch)
            for turn in range(2, 8):
                for place, name in enumerate(names):
                    labels = tuple(f"a label of length {n}" for n in range((turn * 5 + place) % 7))
                    module.frames[name] = frame(name, turn, labels)
                state = ("live", "frozen", "failed")[turn % 3]
                error = "no route to the camera, and a reason that is long" * 3 if state == "failed" else None
                module.cameras[turn] = camera(names[turn], state, lastError=error, nextTrySeconds=29.0)
                await tab.until(f"tiles.get('{names[0]}').shown", turn)
                await tab.until(f"tiles.get('{names[turn]}').badge.textContent", state)
            shifts = await tab.evaluate("window.shifts")
            assert sum(shift["value"] for shift in shifts) < 0.1, shifts

    asyncio.run(scenario())


EVENT_TEXTS = {
    "zone-entered": "person entered queue",
    "zone-left": "person left queue",
    "zone-lost": "person lost in queue",
    "zone-dwell": "person in queue for 30 s",
    "zone-occupied": "queue occupied: 5",
    "zone-vacated": "queue vacated: 5",
    "zone-empty": "queue empty",
    "zone-filled": "queue filled",
    "line-crossed": "person crossed door ←",
}


def test_every_type_of_event_has_a_text_and_the_newest_is_first() -> None:
    """From the log, then live over the one stream; an event that came both ways is shown once."""
    assert set(EVENT_TEXTS) == set(EVENT_TYPES)

    async def scenario() -> None:
        module = FakePageBackend(
            [camera("dock", zones={"queue": SQUARE}, lines={"door": DOOR}), camera("yard")]
        )
        kinds = list(EVENT_TEXTS)
        made = [
            event(n, kind, count=5, dwellSeconds=30.2, direction="left-to-right")
            for n, kind in enumerate(kinds)
        ]
        module.events = made[:8][::-1]
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            shown = [EVENT_TEXTS[kind] for kind in kinds[:8][::-1]]
            await tab.until(texts("#event-list .what"), shown)
            module.live_events += [made[7], made[8]]
            await tab.until(texts("#event-list .what"), [EVENT_TEXTS["line-crossed"], *shown])
            assert await tab.evaluate(texts("#event-list .where")) == ["dock"] * 9
            assert module.streams == 1
            module.cameras = [camera("dock")]
            await tab.until("document.getElementById('events').hidden", True)

    asyncio.run(scenario())


def test_a_page_without_zones_and_lines_has_no_list_of_events() -> None:
    async def scenario() -> None:
        module = FakePageBackend([camera("dock")])
        module.events = [event(1)]
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("tiles.get('dock') && tiles.get('dock').shown > 0", True)
            assert await tab.evaluate(texts("#events")) == []

    asyncio.run(scenario())


def test_zones_and_lines_are_drawn_with_their_counts_and_follow_the_events() -> None:
    """An event makes the page fetch the counts, time does, too; arrows show which direction is counted."""

    async def scenario() -> None:
        module = FakePageBackend([camera("dock", zones={"queue": SQUARE}, lines={"door": DOOR})])
        door = {"left-to-right": {"person": 3}, "right-to-left": {"person": 1, "car": 1}}
        module.scene = {"tracks": [], "zones": {"queue": {"inside": {"person": 2}}}, "lines": {"door": door}}
        labels = """(() => {
          const pen = document.createElement("canvas").getContext("2d");
          const place = { x: 100, y: 0, w: 600, h: 450 };
          return tiles.get("dock").scene.placeLabels(pen, place, 1, 12).map((label) => label.text);
        })()"""
        drawn = """(() => {
          const { canvas } = tiles.get("dock"), pen = canvas.getContext("2d");
          const at = (x, y) => pen.getImageData(x * canvas.width, y * canvas.height, 1, 1).data;
          const [edge, line] = [at(0.5, 0.9), at(0.5, 0.5)];
          return [edge[1] > edge[0] + 40, line[0] > line[2] + 40];
        })()"""
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("typeof tiles === 'object' && tiles.has('dock')", True)
            await tab.until(labels, ["queue 2", "door ← 3 → 2"])
            module.frames = {"dock": frame("dock", 2, ())}
            await tab.until("tiles.get('dock').shown", 2)
            assert await tab.evaluate(drawn) == [True, True]
            module.scene["zones"]["queue"]["inside"] = {}
            module.live_events.append(event(1, "zone-left"))
            await tab.until(labels, ["queue 0", "door ← 3 → 2"])
            door["left-to-right"] = {}  # the line was edited, which is no event
            await tab.evaluate("tiles.get('dock').scene.countedAt -= COUNTS_STALE_MS")
            await tab.until(labels, ["queue 0", "door ← 0 → 2"])

    asyncio.run(scenario())


def test_an_arrow_points_to_where_those_go_who_cross_from_left_to_right() -> None:
    """Of lines in every direction; the other direction is the opposite."""
    lines = {"←": DOOR, "→": DOOR[::-1], "↓": [[0.1, 0.5], [0.9, 0.5]], "↑": [[0.9, 0.5], [0.1, 0.5]]}
    lines["↙"] = [[0.2, 0.2], [0.8, 0.8]]
    opposite = {"←": "→", "→": "←", "↓": "↑", "↑": "↓", "↙": "↗"}

    async def scenario() -> None:
        async with browser() as chromium, served(FakePageBackend([camera("dock")])) as (url, _):
            tab = await chromium.open(url)
            await tab.until("typeof crossingArrow", "function")
            for arrow, line in lines.items():
                call = f"crossingArrow({json.dumps(line)}, '%s', 100, 100)"
                assert await tab.evaluate(call % "left-to-right") == arrow
                assert await tab.evaluate(call % "right-to-left") == opposite[arrow]

    asyncio.run(scenario())


def test_a_track_has_a_tail_of_its_last_two_seconds() -> None:
    async def scenario() -> None:
        module = FakePageBackend([camera("dock", zones={"queue": SQUARE})])
        tail = """(() => {
          const pen = document.createElement("canvas").getContext("2d"), points = [];
          pen.moveTo = (x, y) => points.push([x, y]);
          pen.lineTo = (x, y) => points.push([x, y]);
          const box = (left) => ({ left, top: 0.2, width: 0.1, height: 0.3 });
          const frames = new Map([10, 12, 13, 14, 15].map((n) => [n, {
            sequence: n, capturedAt: `2026-11-30T10:00:${n}.000Z`,
            detections: [7, null].map((trackId) => ({ trackId, classId: 0, box: box(n / 100) })),
          }]));
          const place = { x: 0, y: 0, w: 100, h: 100 };
          tiles.get("dock").scene.drawTails(pen, place, frames.get(14), frames, 1);
          return points.map(([x, y]) => [Math.round(x), Math.round(y)]);
        })()"""
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("typeof tiles === 'object' && tiles.has('dock')", True)
            assert await tab.evaluate(tail) == [[17, 50], [18, 50], [18, 50], [19, 50]]

    asyncio.run(scenario())


def test_nothing_moves_when_events_come() -> None:
    """The score of layout shifts stays below 0.1 with many events, in a wide window."""

    async def scenario() -> None:
        module = FakePageBackend([camera("dock", zones={"queue": SQUARE}), camera("yard")])
        module.answers.clear()
        watch = """(() => {
          window.shifts = [];
          const note = ({ value }) => window.shifts.push(value);
          new PerformanceObserver((list) => list.getEntries().forEach(note))
            .observe({ type: "layout-shift", buffered: true });
          return true;
        })()"""
        async with browser() as chromium, served(module) as (url, _):
            tab = await chromium.open(url)
            await tab.until("performance.getEntriesByType('paint').length > 0", True)
            module.answers.set()
            await tab.until("tiles.size", 2)
            assert await tab.evaluate(watch)
            for turn in range(8):
                words = ("a", "a label of length", "x")[turn % 3]
                module.live_events += [event(10 * turn + n, label=words) for n in range(10)]
                await tab.until("events.events.length", min(50, 10 * turn + 10))
                newest = f"'{event(10 * turn + 9)['id']}'"
                await tab.until(f"events.events[0].id === {newest} && !events.drawing", True)
            assert await tab.evaluate("document.querySelectorAll('#event-list li').length") == 50
            shifts = await tab.evaluate("window.shifts")
            assert sum(shifts) < 0.1, shifts

    asyncio.run(scenario())
