"""The handlers of the JSON API: each reads its question, asks the view, and answers."""

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from importlib.resources import files

from aiohttp import web

from visionedge.config.schema import json_schema
from visionedge.errors import SourceError
from visionedge.frames.types import Result, frame_document, utc_text
from visionedge.runtime.redaction import redact, redact_document
from visionedge.web.backend import Busy, Document, ModuleView
from visionedge.web.guard import Access, client_of, unauthorized
from visionedge.web.jpeg import Look, Permits, Pictures, RequestResources
from visionedge.web.openapi import describe
from visionedge.web.requests import decode_upload, decoding_bytes, read_upload
from visionedge.web.responses import (
    RequestError,
    cut,
    integer_value,
    json_answer,
    json_bytes,
    seconds_value,
    text_value,
    truth_value,
)
from visionedge.web.results import Documents
from visionedge.web.streams import Closing, send_events, send_pictures

# The page at `/`: one document with its styles and its script inside, so that it needs nothing else.
#
# It carries no data and no secret: the script fetches those, with the token where there is one.


class Page:
    """The page, put together once from the files of the package."""

    def __init__(self) -> None:
        folder = files("visionedge.web") / "page"
        style = (folder / "style.css").read_text(encoding="utf-8")
        scripts = ("stream.js", "tiles.js", "page.js", "doctor.js")
        script = "".join((folder / name).read_text(encoding="utf-8") for name in scripts)
        html = (folder / "index.html").read_text(encoding="utf-8")
        self._body = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode()
        self._headers = {
            "Content-Security-Policy": _policy(style, script),
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
        }

    def answer(self, status: int = 200) -> web.Response:
        """The page; with status 401 it is the same one, and its script asks for the token."""
        headers = dict(self._headers)
        if status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="visionedge"'
        return web.Response(
            body=self._body, status=status, content_type="text/html", charset="utf-8", headers=headers
        )


def _policy(style: str, script: str) -> str:
    """Only this very style and script, and data from where the page came from."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


WAIT_LIMIT_S = 60.0
"""The longest `?timeout=` of a frame."""
WAIT_DEFAULT_S = 10.0
PICTURE_STREAMS_AT_ONCE = 32
EVENT_STREAMS_AT_ONCE = 64
WAITS_AT_ONCE = 64
EXAMINATIONS_AT_ONCE = 8
DOCUMENT_KEPT_S = 0.5
"""So old may the status, the list of cameras and the log be, where making them is slow (`SharedDocument`)."""
SNAPSHOT_LEAST_PX, SNAPSHOT_MOST_PX = 16, 8192

_KEPT_TIMES = 10
_MOST_ANSWERS = 256
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Api:
    """The handlers and what they share; one per application, made and closed by `app.make_app`."""

    def __init__(self, view: ModuleView, access: Access) -> None:
        self.view = view
        self.shared = RequestResources()
        self.closing = Closing()
        self._access = access
        self._streams = _places(PICTURE_STREAMS_AT_ONCE, "too many viewers of live streams")
        self._events = _places(EVENT_STREAMS_AT_ONCE, "too many viewers of frames")
        self._waits = _places(WAITS_AT_ONCE, "too many requests wait for a frame")
        self._examinations = Permits(EXAMINATIONS_AT_ONCE, "too many wait for an examination")
        self._pictures = Pictures(self.shared.desk)
        self._documents = Documents()
        self._answers: dict[str, tuple[int, bytes, Mapping[str, str]]] = {}
        self._status = SharedDocument(lambda: redact_document(self.view.status()), DOCUMENT_KEPT_S)
        self._cameras = SharedDocument(
            lambda: {"cameras": redact_document(self.view.cameras())}, DOCUMENT_KEPT_S
        )
        self._log = SharedDocument(lambda: {"text": self.view.log()}, DOCUMENT_KEPT_S)
        self._page = Page()

    def end_streams(self) -> None:
        """The server closes: streams and waits end."""
        self.closing.set()
        self._access.streams.set()

    async def close(self) -> None:
        """End what is under way."""
        await self.shared.close()

    async def page(self, _request: web.Request) -> web.Response:
        """``/``."""
        return self._page.answer()

    def sign_in(self) -> web.Response:
        """The page for a browser that has not shown a token yet: 401, and it asks for one."""
        return self._page.answer(401)

    async def healthz(self, _request: web.Request) -> web.Response:
        """``/healthz``."""
        return _condition("ok", "unhealthy", self.view.health())

    async def readyz(self, _request: web.Request) -> web.Response:
        """``/readyz``, with the device, so that a degraded module is not silent about it."""
        engine = self._status.document().get("engine") or {}
        known = {key: engine[key] for key in ("requested", "effective", "degraded") if key in engine}
        return _condition("ready", "not_ready", self.view.readiness(), {"engine": known} if known else {})

    async def metrics(self, _request: web.Request) -> web.Response:
        """``/metrics``."""
        return web.Response(body=self.view.metrics(), headers={"Content-Type": _METRICS_TYPE})

    async def openapi(self, _request: web.Request) -> web.Response:
        """``/openapi.json``."""
        return json_answer(describe())

    async def status(self, _request: web.Request) -> web.Response:
        """``/api/v1/status``."""
        return web.Response(body=self._status.body(), content_type="application/json")

    async def doctor(self, _request: web.Request) -> web.Response:
        """``/api/v1/doctor``."""
        with self._examinations.one():
            report = await self.closing.race(self.view.doctor())
        if report is None:
            raise Busy("the module is stopping")
        return json_answer(redact_document(report))

    async def schema(self, _request: web.Request) -> web.Response:
        """``/api/v1/config/schema``."""
        return json_answer(json_schema())

    async def log(self, _request: web.Request) -> web.Response:
        """``/api/v1/log``."""
        text = self._log.document()["text"]
        return web.Response(text=text, content_type="text/plain", charset="utf-8")

    async def cameras(self, _request: web.Request) -> web.Response:
        """``/api/v1/cameras``."""
        return web.Response(body=self._cameras.body(), content_type="application/json")

    async def camera(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}``."""
        camera = self.view.camera(request.match_info["name"])
        if camera is None:
            raise _unknown(request.match_info["name"])
        return json_answer(redact_document(camera))

    def _must_know(self, name: str) -> None:
        if not self.view.knows(name):
            raise _unknown(name)

    async def frame(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}/frame``; with `after` or `timeout` it waits."""
        name = request.match_info["name"]
        self._must_know(name)
        if not request.query_string:
            return self._framed(self._newest(name))
        after = integer_value(request, "after")
        timeout_s = seconds_value(request, "timeout", most_s=WAIT_LIMIT_S)
        if after is None and timeout_s is None:
            return self._framed(self._newest(name))
        with self._waits.one(client_of(request)):
            result = await self._newer(name, after, WAIT_DEFAULT_S if timeout_s is None else timeout_s)
        if result is not None:
            return self._framed(result)
        self._must_know(name)
        if after is None:
            raise _no_frame_yet(name)
        return web.Response(status=204)

    async def _newer(self, name: str, after: int | None, timeout_s: float) -> Result | None:
        valid = self._access.streams
        result = await valid.race(self.view.newer(name, after, timeout_s))
        if self.closing.is_set() and result is None:
            raise Busy("the module is stopping")
        if valid.is_set():
            raise unauthorized()
        return result

    def _newest(self, name: str) -> Result:
        result = self.view.latest(name)
        if result is None:
            raise _no_frame_yet(name)
        return result

    def _framed(self, result: Result) -> web.Response:
        """A result as an answer, which is made once for all who ask until the camera has a newer one."""
        camera, sequence = result.frame.camera, result.frame.sequence
        kept = self._answers.get(camera)
        if kept is None or kept[0] != sequence:
            headers = {"Content-Type": "application/json", **_frame_headers(result)}
            kept = (sequence, self._documents.of(result) + b"\n", headers)
            if len(self._answers) >= _MOST_ANSWERS:
                self._answers.clear()
            self._answers[camera] = kept
        return web.Response(body=kept[1], headers=kept[2])

    async def snapshot(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}/snapshot.jpg``."""
        name = request.match_info["name"]
        self._must_know(name)
        look = Look(truth_value(request, "annotate"), _width_px(request))
        result = self._newest(name)
        try:
            jpeg = await self._pictures.jpeg(result, look)
        except SourceError as error:
            raise RequestError(503, str(error), code="no_picture", headers={"Retry-After": "1"}) from None
        return web.Response(body=jpeg, content_type="image/jpeg", headers=_frame_headers(result))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """``/api/v1/cameras/{name}/stream.mjpg``."""
        name = request.match_info["name"]
        self._must_know(name)
        look = Look(annotated=True, width_px=_width_px(request))
        valid = self._access.streams
        with self._streams.one(client_of(request)):
            return await send_pictures(
                request, self.view, name, pictures=self._pictures, look=look, closing=valid
            )

    async def frames(self, request: web.Request) -> web.StreamResponse:
        """``/api/v1/frames``: server-sent events."""
        camera = text_value(request, "camera")
        if camera is not None:
            self._must_know(camera)
        valid = self._access.streams
        with self._events.one(client_of(request)):
            async with self.view.subscribe(camera) as frames:
                return await send_events(request, frames, valid)

    async def detect(self, request: web.Request) -> web.Response:
        """``POST /api/v1/detect``: a picture in, its frame object out."""
        async with AsyncExitStack() as held:
            # The permit comes before the body, so that many large uploads cannot fill the memory.
            held.enter_context(self.shared.permits.one())
            data = await read_upload(request)
            await held.enter_async_context(self.shared.memory.hold(decoding_bytes(data)))
            work = self._analysed(data, held.pop_all())
            del data
        return json_answer(frame_document(await self.shared.unattended.run(work), source="upload"))

    async def _analysed(self, data: bytes, held: AsyncExitStack) -> Result:
        """Decode and analyse; what it holds is free when that is done."""
        async with held:
            picture = await self.shared.desk.run(partial(decode_upload, data))
            del data
            return await self.view.detect(picture)


class SharedDocument:
    """A document that costs something to make: several who ask for it at once get the same.

    It is kept for ten times as long as it took to make, and `most_s` at most: a small one is always made
    anew, and a large one takes a tenth of the loop's time, or a little more.
    """

    def __init__(
        self, make: Callable[[], Document], most_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._most_s = most_s
        self._clock = clock
        self._until_s: float | None = None
        self._document: Document = {}
        self._body = b""

    def document(self) -> Document:
        """The document, not to be changed."""
        begun_s = self._clock()
        if self._until_s is None or begun_s >= self._until_s:
            self._document, self._body = self._make(), b""
            now_s = self._clock()
            self._until_s = now_s + min(self._most_s, _KEPT_TIMES * (now_s - begun_s))
        return self._document

    def body(self) -> bytes:
        """The same as JSON, which ends its line."""
        document = self.document()
        self._body = self._body or json_bytes(document) + b"\n"
        return self._body


def _places(limit: int, message: str) -> Permits:
    """Places of which one address takes half at most; a reverse proxy is one address for all its clients."""
    return Permits(limit, message, per_client=max(1, limit // 2))


def _condition(good: str, code: str, reasons: list[str], more: Document | None = None) -> web.Response:
    if not reasons:
        return json_answer({"status": good, **(more or {})})
    reasons = [redact(reason) for reason in reasons]
    error = {"code": code, "message": "; ".join(reasons)}
    document = {"status": code, "reasons": reasons, **(more or {}), "error": error}
    return json_answer(document, status=503, headers={"Retry-After": "2"})


def _unknown(name: str) -> RequestError:
    return RequestError(404, f"there is no camera '{cut(name)}'", code="unknown_camera")


def _no_frame_yet(name: str) -> RequestError:
    message = f"camera '{name}' has no analysed frame yet; /api/v1/cameras/{name} tells its state"
    return RequestError(503, message, code="no_frame_yet", headers={"Retry-After": "1"})


def _frame_headers(result: Result) -> dict[str, str]:
    """What lets a client match a picture to its frame object."""
    return {
        "X-Visionedge-Camera": result.frame.camera,
        "X-Visionedge-Sequence": str(result.frame.sequence),
        "X-Visionedge-Epoch": str(result.frame.epoch),
        "X-Visionedge-Captured-At": utc_text(result.frame.captured_utc),
    }


def _width_px(request: web.Request) -> int | None:
    return integer_value(request, "width", least=SNAPSHOT_LEAST_PX, most=SNAPSHOT_MOST_PX)
