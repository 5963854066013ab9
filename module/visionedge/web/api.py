"""The handlers of the JSON API: each reads its question, asks the view, and answers."""

import asyncio
from functools import partial

from aiohttp import BodyPartReader, MultipartReader, web

from visionedge.capture.pictures import decode_picture
from visionedge.errors import SourceError
from visionedge.frames import Result, frame_document, utc_text
from visionedge.schema import json_schema
from visionedge.uris import redact, redact_document
from visionedge.web.answers import (
    RequestError,
    integer_value,
    json_answer,
    read_body,
    seconds_value,
    text_value,
    truth_value,
)
from visionedge.web.dashboard import Page
from visionedge.web.openapi import describe
from visionedge.web.pictures import Desk, Look, Permits, Pictures, is_picture
from visionedge.web.streams import Closing, Documents, send_events, send_pictures
from visionedge.web.view import Busy, Document, ModuleView

WAIT_LIMIT_S = 60.0
"""The longest `?timeout=` of a frame."""
WAIT_DEFAULT_S = 10.0
UPLOAD_LIMIT_BYTES = 20 * 2**20
UPLOAD_LIMIT_S = 30.0
UPLOADS_AT_ONCE = 4
PICTURE_STREAMS_AT_ONCE = 32
SNAPSHOT_LEAST_PX, SNAPSHOT_MOST_PX = 16, 8192

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Api:
    """The handlers and what they share; one per application, made and closed by `app.make_app`."""

    def __init__(self, view: ModuleView) -> None:
        self.view = view
        self.desk = Desk()
        self.closing = Closing()
        self.uploads = Permits(UPLOADS_AT_ONCE, "too many pictures are being analysed for others")
        self._streams = Permits(PICTURE_STREAMS_AT_ONCE, "too many viewers of live streams")
        self._pictures = Pictures(self.desk)
        self._documents = Documents()
        self._page = Page()

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
        engine = self.view.status().get("engine") or {}
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
        return json_answer(redact_document(self.view.status()))

    async def doctor(self, _request: web.Request) -> web.Response:
        """``/api/v1/doctor``."""
        report = await self.closing.race(self.view.doctor())
        if report is None:
            raise Busy("the module is stopping")
        return json_answer(redact_document(report))

    async def schema(self, _request: web.Request) -> web.Response:
        """``/api/v1/config/schema``."""
        return json_answer(json_schema())

    async def log(self, _request: web.Request) -> web.Response:
        """``/api/v1/log``."""
        return web.Response(text=self.view.log(), content_type="text/plain", charset="utf-8")

    async def cameras(self, _request: web.Request) -> web.Response:
        """``/api/v1/cameras``."""
        return json_answer({"cameras": redact_document(self.view.cameras())})

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
        after = integer_value(request, "after")
        timeout_s = seconds_value(request, "timeout", most_s=WAIT_LIMIT_S)
        if after is None and timeout_s is None:
            return self.framed(self.newest(name))
        waited_s = WAIT_DEFAULT_S if timeout_s is None else timeout_s
        result = await self.closing.race(self.view.newer(name, after, waited_s))
        if result is not None:
            return self.framed(result)
        if self.closing.is_set():
            raise Busy("the module is stopping")
        self._must_know(name)
        if after is None:
            raise _no_frame_yet(name)
        return web.Response(status=204)

    def newest(self, name: str) -> Result:
        """The newest result of a camera, as it is now.

        Raises:
            RequestError: there is no such camera, or no frame of it yet.
        """
        self._must_know(name)
        result = self.view.latest(name)
        if result is None:
            raise _no_frame_yet(name)
        return result

    def framed(self, result: Result) -> web.Response:
        """A result as the answer of ``/api/v1/cameras/{name}/frame``."""
        data = self._documents.of(result) + b"\n"
        return web.Response(body=data, content_type="application/json", headers=_frame_headers(result))

    async def snapshot(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}/snapshot.jpg``."""
        name = request.match_info["name"]
        self._must_know(name)
        look = Look(truth_value(request, "annotate"), _width_px(request))
        result = self.newest(name)
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
        with self._streams.one():
            return await send_pictures(
                request, self.view, name, pictures=self._pictures, look=look, closing=self.closing
            )

    async def frames(self, request: web.Request) -> web.StreamResponse:
        """``/api/v1/frames``: server-sent events."""
        camera = text_value(request, "camera")
        if camera is not None:
            self._must_know(camera)
        async with self.view.subscribe(camera) as results:
            return await send_events(request, results, self._documents, self.closing)

    async def detect(self, request: web.Request) -> web.Response:
        """``POST /api/v1/detect``: a picture in, its frame object out."""
        # The permit comes before the body, so that many large uploads cannot fill the memory.
        with self.uploads.one():
            data = await _uploaded(request)
            _look_like_picture(data)
            try:
                picture = await self.desk.run(partial(decode_picture, data))
            except SourceError as error:
                raise RequestError(400, str(error), code="bad_picture") from None
            del data
            result = await self.view.detect(picture)
        return json_answer(frame_document(result, source="upload"))


def _condition(good: str, code: str, reasons: list[str], more: Document | None = None) -> web.Response:
    if not reasons:
        return json_answer({"status": good, **(more or {})})
    reasons = [redact(reason) for reason in reasons]
    error = {"code": code, "message": "; ".join(reasons)}
    document = {"status": code, "reasons": reasons, **(more or {}), "error": error}
    return json_answer(document, status=503, headers={"Retry-After": "2"})


def _unknown(name: str) -> RequestError:
    return RequestError(404, f"there is no camera '{name}'", code="unknown_camera")


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


def _look_like_picture(data: bytes) -> None:
    """The first bytes tell what it is, whatever the client calls it."""
    if not is_picture(data):
        raise RequestError(415, "the body is no picture; send a JPEG, PNG or WebP")


async def _uploaded(request: web.Request) -> bytes:
    if not request.content_type.startswith("multipart/"):
        return await read_body(request, UPLOAD_LIMIT_BYTES, UPLOAD_LIMIT_S)
    try:
        async with asyncio.timeout(UPLOAD_LIMIT_S):
            return await _first_file(await request.multipart())
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {UPLOAD_LIMIT_S:g} s") from None
    except (ValueError, RuntimeError, AssertionError):
        raise RequestError(400, "the multipart body cannot be read") from None


async def _first_file(form: MultipartReader) -> bytes:
    part = await form.next()
    while part is not None:
        if isinstance(part, BodyPartReader) and part.filename is not None:
            return await _part_bytes(part)
        part = await form.next()
    raise RequestError(400, "the form holds no file", code="empty_body")


async def _part_bytes(part: BodyPartReader) -> bytes:
    data = bytearray()
    while chunk := await part.read_chunk(65536):
        data += chunk
        if len(data) > UPLOAD_LIMIT_BYTES:
            raise RequestError(413, f"the file is larger than {UPLOAD_LIMIT_BYTES / 2**20:.3g} MiB")
    if not data:
        raise RequestError(400, "the file is empty", code="empty_body")
    return bytes(data)
