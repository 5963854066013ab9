"""A fake `Backend` for HTTP tests, with scripted answers over real `LatestResults`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import aiohttp
import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.config.documents import Document
from visionedge.config.schema import HttpConfig
from visionedge.errors import BusyError
from visionedge.frames.types import Detections, Frame, FrameResult, InputSpec, Picture, Timing
from visionedge.scene.events import EventFilter
from visionedge.scene.scene import Scene
from visionedge.scene.totals import CountRow
from visionedge.scene.writer import SceneWriter
from visionedge.web.backend import Backend, ModelMetadata, UnknownModelError, ViewerStream
from visionedge.web.latest_results import LatestResults
from visionedge.web.server import HttpServer

LABELS = ("person", "bicycle", "car")
SPEC = InputSpec(16, 8)


def grey(width_px: int = 64, height_px: int = 48, level: int = 90) -> Picture:
    """A plain grey picture."""
    return np.full((height_px, width_px, 3), level, np.uint8)


def jpeg(picture: Picture | None = None, kind: str = ".jpg") -> bytes:
    """A picture, encoded."""
    done, data = cv2.imencode(kind, grey() if picture is None else picture)
    assert done
    return data.tobytes()


def decode(data: bytes) -> Picture:
    """An encoded picture as an array."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return np.asarray(picture, np.uint8)


def result(
    camera: str = "dock",
    sequence: int = 1,
    *,
    picture: Picture | None = None,
    boxes: list[list[float]] | None = None,
    full_picture: Callable[[], Picture] | None = None,
) -> FrameResult:
    """A result with one class of boxes (default one, in the middle), labels as `LABELS`."""
    picture = grey() if picture is None else picture
    boxes = [[0.25, 0.25, 0.75, 0.75]] if boxes is None else boxes
    found = Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.linspace(0.9, 0.5, len(boxes), dtype=np.float32),
        np.arange(len(boxes), dtype=np.int32),
    )
    height_px, width_px = picture.shape[:2]
    moment = datetime(2026, 11, 22, 10, 0, 0, 123_000, UTC)
    frame = Frame(
        camera,
        sequence,
        3,
        sequence * 1_000_000,
        moment,
        width_px,
        height_px,
        np.zeros((SPEC.height_px, SPEC.width_px, 3), np.uint8),
        SPEC.place(width_px, height_px),
        full_picture or (lambda: picture),
    )
    return FrameResult(frame, found, Timing(3_100_000, 7_900_000, 12_400_000, 4), "cpu", "nano", LABELS)


class FakeBackend:
    """A running module with the given cameras; `seen` has the analysed pictures."""

    def __init__(self, *cameras: str, latest_results: LatestResults | None = None) -> None:
        self.latest_results = latest_results or LatestResults()
        self.names = list(cameras)
        self.unhealthy: list[str] = []
        self.unready: list[str] = []
        self.busy = False
        self.error: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.engine: Document = {
            "requested": "auto",
            "effective": "cpu",
            "reason": "no NVIDIA device is visible here",
            "reasonCode": "no-device",
            "degraded": False,
            "since": "2026-11-22T10:00:00.000Z",
        }
        self.doctor_report: Document = {
            "schema": "visionedge/doctor/1",
            "version": "0.2.0",
            "build": "0.2.0+unknown",
            "at": "2026-11-22T10:00:00.000Z",
            "system": "Linux",
            "fulfilled": True,
            "device": {
                "requested": "auto",
                "effective": "cpu",
                "reasonCode": "library-missing",
                "reason": "libcublasLt.so.12 is missing",
            },
            "environment": {
                "container": True,
                "iotEdge": "edge",
                "kernel": "eflow",
                "release": "6.6",
                "passthrough": "none",
            },
            "firstBroken": "passthrough",
            "chain": [],
            "systemChecks": [],
        }
        self.facts: ModelMetadata | None = ModelMetadata("nano", "ab" * 32, SPEC, 5, 4, LABELS)
        self.more_models: list[ModelMetadata] = []
        self.asked_models: list[str] = []
        self.unready_models: dict[str, str] = {}
        self.last_error: str | None = None
        self.seen: list[Picture] = []
        self.rule_names: list[str] = []
        self.scene_log: SceneWriter | None = None

    def health(self) -> list[str]:
        return self.unhealthy

    def readiness(self) -> list[str]:
        return self.unready

    def status(self) -> Document:
        if self.error is not None:
            raise self.error
        return {
            "version": "0.2.0",
            "http": {"access": "local"},
            "newerState": [],
            "build": {"text": "0.2.0+unknown", "revision": "unknown", "builtAt": "unknown"},
            "uptimeSeconds": 12.5,
            "ready": not self.unready,
            "reasons": self.unready,
            "engine": self.engine,
            "model": {
                "name": "nano",
                "sha256": "ab" * 32,
                "head": "yolox",
                "classes": 3,
                "inputWidth": SPEC.width_px,
                "inputHeight": SPEC.height_px,
            },
            "models": {},
            "fetching": None,
            "cameras": self.cameras(),
            "scenes": {"storage": None, "cameras": {}},
            "capacity": None,
            "hub": {"state": "local"},
        }

    def cameras(self) -> list[Document]:
        return [self._document(name) for name in self.names]

    def camera(self, name: str) -> Document | None:
        return self._document(name) if name in self.names else None

    def scene(self, name: str) -> Document | None:
        return Scene(name).document() if name in self.names else None

    def _document(self, name: str) -> Document:
        latest = self.latest_results.latest(name)
        return {
            "name": name,
            "uri": "demo:",
            "enabled": True,
            "state": "live",
            "epoch": 3,
            "framesRead": 10,
            "framesAnalysed": latest.frame.sequence if latest else 0,
            "dropped": {"replaced": 2},
            "fps": 4.5,
            "ageMs": 80.0 if latest else None,
            "lastError": self.last_error,
            "nextTrySeconds": None,
            "throttle": None,
            "sequence": latest.frame.sequence if latest else None,
            "zones": {},
            "lines": {},
        }

    def has_camera(self, name: str) -> bool:
        return name in self.names

    def latest(self, name: str) -> FrameResult | None:
        return self.latest_results.latest(name)

    async def wait_for_newer(self, name: str, after: int | None, timeout_s: float) -> FrameResult | None:
        return await self.latest_results.wait_for_newer(name, after, timeout_s)

    def subscribe(
        self, camera: str | None, *, with_events: bool = False
    ) -> AbstractAsyncContextManager[ViewerStream]:
        return self.latest_results.subscribe(camera, with_events=with_events)

    def subscribe_events(self, wanted: EventFilter) -> AbstractAsyncContextManager[ViewerStream]:
        return self.latest_results.subscribe_events(wanted)

    def rules(self, camera: str | None) -> list[str]:
        return self.rule_names if camera in (None, *self.names) else []

    async def scene_events(
        self, wanted: EventFilter, *, before: str | None = None, after: str | None = None, limit: int
    ) -> list[Document]:
        return (
            []
            if self.scene_log is None
            else self.scene_log.events(wanted, before=before, after=after, limit=limit)
        )

    async def scene_counts(
        self, camera: str, begin: datetime, end: datetime, by: Literal["hour", "day"], *, limit: int
    ) -> list[CountRow]:
        return [] if self.scene_log is None else self.scene_log.counts(camera, begin, end, by, limit)

    async def detect(self, picture: Picture, model: str | None = None) -> FrameResult:
        if model not in (None, *(each.name for each in self.models())):
            raise UnknownModelError(f"no model is called '{model}'")
        self.seen.append(picture)
        await self._work()
        return result("upload", len(self.seen), picture=picture)

    async def doctor(self) -> Document:
        await self._work()
        return self.doctor_report

    def log(self) -> str:
        return "camera dock is live at rtsp://***@192.0.2.5/\n"

    def metrics(self) -> bytes:
        return b"visionedge_ready 1.0\n"

    def models(self) -> list[ModelMetadata]:
        return [] if self.facts is None else [self.facts, *self.more_models]

    def model_readiness(self, name: str) -> str | None:
        return self.unready_models.get(name) or next(iter(self.readiness()), None)

    async def infer_rows(self, images: NDArray[np.uint8], model: str) -> NDArray[np.float32]:
        """Row k of picture i holds its mean, k, and zeros."""
        self.asked_models.append(model)
        await self._work()
        rows = np.zeros((len(images), 5, 6), np.float32)
        rows[:, :, 0] = images.reshape(len(images), -1).mean(axis=1)[:, None]
        rows[:, :, 1] = np.arange(5)
        return rows

    async def _work(self) -> None:
        if self.busy:
            raise BusyError("the engine has no room", retry_after_s=7)
        if self.error is not None:
            raise self.error
        if self.hold is not None:
            await self.hold.wait()

    def remove(self, name: str) -> None:
        """Remove a camera."""
        self.names.remove(name)
        self.latest_results.forget(name)


Client = aiohttp.ClientSession


@asynccontextmanager
async def serving(
    module: Backend, token: str | None = None, http: HttpConfig | None = None
) -> AsyncIterator[Client]:
    """A real server over the module, and a client whose paths are relative to it."""
    server = await HttpServer.start(module, http or HttpConfig(port=0, token=token))
    try:
        async with aiohttp.ClientSession(
            server.url, timeout=aiohttp.ClientTimeout(total=20), trust_env=False
        ) as client:
            yield client
    finally:
        await server.close()


def run_scenario(
    module: Backend,
    conversation: Callable[[Client], Awaitable[None]],
    *,
    token: str | None = None,
    http: HttpConfig | None = None,
) -> None:
    """Serve the module, run the scenario with a client, and close everything."""

    async def whole() -> None:
        async with serving(module, token, http) as client:
            await conversation(client)

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(5):
        # The condition may be about anything, so there is no event for it.
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0)


async def error_of(answer: aiohttp.ClientResponse) -> tuple[int, str, str]:
    """Status, code and message of an error document."""
    document: Any = await answer.json()
    assert set(document["error"]) == {"code", "message"}
    return answer.status, document["error"]["code"], document["error"]["message"]
