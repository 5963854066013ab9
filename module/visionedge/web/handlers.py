"""The handlers of the JSON API, and the page: each reads its request, asks the backend, and answers."""

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from functools import partial
from importlib.resources import files

from aiohttp import web

from visionedge.config.documents import Document
from visionedge.config.json_schema import json_schema
from visionedge.errors import BusyError, SourceError
from visionedge.frames.types import FrameResult, build_frame_document, format_utc
from visionedge.outbound.messages import encode_json
from visionedge.runtime.limits import ConcurrencyLimit
from visionedge.runtime.redaction import redact, redact_document
from visionedge.web.access_control import AccessControl, get_client_key, unauthorized_error
from visionedge.web.backend import Backend, UnknownModelError
from visionedge.web.documents import (
    ErrorDetailsDocument,
    HealthDocument,
    ReadinessDeviceDocument,
    ReadinessDocument,
)
from visionedge.web.jpeg import JpegCache, JpegOptions
from visionedge.web.openapi import build_openapi
from visionedge.web.request_body import RequestResources, decode_upload, estimate_decoding_bytes, read_upload
from visionedge.web.responses import (
    RequestError,
    json_response,
    query_bool,
    query_integer,
    query_seconds,
    query_text,
    unknown_camera_error,
)
from visionedge.web.scene_log import answer_counts, answer_events, read_event_filter, read_missed_events
from visionedge.web.streams import StopSignal, resume_events, send_events, send_mjpeg

WAIT_LIMIT_S = 60.0
"""The longest `?timeout=` of a frame."""
WAIT_DEFAULT_S = 10.0
PICTURE_STREAMS_AT_ONCE = 32
EVENT_STREAMS_AT_ONCE = 64
WAITS_AT_ONCE = 64
EXAMINATIONS_AT_ONCE = 8
MAX_DOCUMENT_AGE_S = 0.5
"""The greatest age of the status, the list of cameras and the log (see `CachedDocument`)."""

SNAPSHOT_MIN_PX, SNAPSHOT_MAX_PX = 16, 8192

_CACHE_TIME_FACTOR = 10
_MAX_CACHED_RESPONSES = 256
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ApiHandlers:
    """The handlers and what they share: one object for each application, made by `server.make_app`."""

    def __init__(self, backend: Backend, access: AccessControl) -> None:
        self.backend = backend
        self.shared = RequestResources()
        self.stop_signal = StopSignal()
        self._access = access
        self._streams = _stream_limit(PICTURE_STREAMS_AT_ONCE, "too many viewers of live streams")
        self._events = _stream_limit(EVENT_STREAMS_AT_ONCE, "too many viewers of frames and events")
        self._waits = _stream_limit(WAITS_AT_ONCE, "too many requests wait for a frame")
        self._doctor_limit = ConcurrencyLimit(EXAMINATIONS_AT_ONCE, "too many requests wait for a report")
        self._jpeg_cache = JpegCache(self.shared.executor)
        self._response_cache: dict[str, tuple[int, bytes, Mapping[str, str]]] = {}
        self._status = CachedDocument(lambda: redact_document(self.backend.status()), MAX_DOCUMENT_AGE_S)
        self._cameras = CachedDocument(
            lambda: {"cameras": redact_document(self.backend.cameras())}, MAX_DOCUMENT_AGE_S
        )
        self._log = CachedDocument(lambda: {"text": self.backend.log()}, MAX_DOCUMENT_AGE_S)
        self._page = DashboardPage()

    def end_streams(self) -> None:
        """End the streams and the waits: the server closes."""
        self.stop_signal.set()
        self._access.stream_stop_signal.set()

    async def close(self) -> None:
        """End the work that runs."""
        await self.shared.close()

    async def page(self, _request: web.Request) -> web.Response:
        """``/``."""
        return self._page.answer()

    def sign_in(self) -> web.Response:
        """The page for a browser without a token: status 401, and the page asks for the token."""
        return self._page.answer(401)

    async def healthz(self, _request: web.Request) -> web.Response:
        """``/healthz``."""
        reasons = self.backend.health()
        document = HealthDocument(status="unhealthy" if reasons else "ok")
        return _health_response(document, reasons)

    async def readyz(self, _request: web.Request) -> web.Response:
        """``/readyz``, with the device, so that a degraded module is not silent about it."""
        engine = self._status.document().get("engine") or {}
        known = {key: engine[key] for key in ("requested", "effective", "degraded") if key in engine}
        reasons = self.backend.readiness()
        document = ReadinessDocument(status="not_ready" if reasons else "ready")
        if known:
            document.engine = ReadinessDeviceDocument(**known)
        return _health_response(document, reasons)

    async def metrics(self, _request: web.Request) -> web.Response:
        """``/metrics``."""
        return web.Response(body=self.backend.metrics(), headers={"Content-Type": _METRICS_TYPE})

    async def openapi(self, _request: web.Request) -> web.Response:
        """``/openapi.json``."""
        return json_response(build_openapi())

    async def status(self, _request: web.Request) -> web.Response:
        """``/api/v1/status``."""
        return web.Response(body=self._status.body(), content_type="application/json")

    async def doctor(self, _request: web.Request) -> web.Response:
        """``/api/v1/doctor``."""
        with self._doctor_limit.acquire():
            report = await self.stop_signal.run_until_set(self.backend.doctor())
        if report is None:
            raise BusyError("the module is stopping")
        return json_response(redact_document(report))

    async def schema(self, _request: web.Request) -> web.Response:
        """``/api/v1/config/schema``."""
        return json_response(json_schema())

    async def log(self, _request: web.Request) -> web.Response:
        """``/api/v1/log``."""
        text = self._log.document()["text"]
        return web.Response(text=text, content_type="text/plain", charset="utf-8")

    async def cameras(self, _request: web.Request) -> web.Response:
        """``/api/v1/cameras``."""
        return web.Response(body=self._cameras.body(), content_type="application/json")

    async def camera(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}``."""
        camera = self.backend.camera(request.match_info["name"])
        if camera is None:
            raise unknown_camera_error(request.match_info["name"])
        return json_response(redact_document(camera))

    async def scene(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}/scene``."""
        scene = self.backend.scene(request.match_info["name"])
        if scene is None:
            raise unknown_camera_error(request.match_info["name"])
        return json_response(scene)

    async def scene_events(self, request: web.Request) -> web.Response:
        """``/api/v1/events``."""
        return await answer_events(request, self.backend, self.shared.executor)

    async def scene_counts(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}/counts``."""
        self._require_camera(request.match_info["name"])
        return await answer_counts(request, self.backend, self.shared.executor)

    async def scene_event_stream(self, request: web.Request) -> web.StreamResponse:
        """``/api/v1/events/stream``: server-sent events, after those that `Last-Event-ID` misses."""
        wanted = await read_event_filter(request, self.backend)
        valid = self._access.stream_stop_signal
        with self._events.acquire(get_client_key(request)):
            async with self.backend.subscribe_events(wanted) as live:
                # After the subscription has begun, so that no event comes between the two.
                missed, comment = await read_missed_events(request, self.backend, wanted)
                async with aclosing(resume_events(missed, live)) as events:
                    return await send_events(request, events, valid, comment, count_lost=lambda: live.lost)

    def _require_camera(self, name: str) -> None:
        if not self.backend.has_camera(name):
            raise unknown_camera_error(name)

    async def frame(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}/frame``; with `after` or `timeout` it waits."""
        name = request.match_info["name"]
        self._require_camera(name)
        if not request.query_string:
            return self._frame_response(self._newest(name))
        after = query_integer(request, "after")
        timeout_s = query_seconds(request, "timeout", max_s=WAIT_LIMIT_S)
        if after is None and timeout_s is None:
            return self._frame_response(self._newest(name))
        with self._waits.acquire(get_client_key(request)):
            result = await self._newer(name, after, WAIT_DEFAULT_S if timeout_s is None else timeout_s)
        if result is not None:
            return self._frame_response(result)
        self._require_camera(name)
        if after is None:
            raise _no_frame_yet_error(name)
        return web.Response(status=204)

    async def _newer(self, name: str, after: int | None, timeout_s: float) -> FrameResult | None:
        valid = self._access.stream_stop_signal
        result = await valid.run_until_set(self.backend.wait_for_newer(name, after, timeout_s))
        if self.stop_signal.is_set() and result is None:
            raise BusyError("the module is stopping")
        if valid.is_set():
            raise unauthorized_error()
        return result

    def _newest(self, name: str) -> FrameResult:
        result = self.backend.latest(name)
        if result is None:
            raise _no_frame_yet_error(name)
        return result

    def _frame_response(self, result: FrameResult) -> web.Response:
        """A result as an answer. It is encoded once for all clients, until the camera has a newer result."""
        camera, sequence = result.frame.camera, result.frame.sequence
        kept = self._response_cache.get(camera)
        if kept is None or kept[0] != sequence:
            headers = {"Content-Type": "application/json", **_frame_headers(result)}
            kept = (sequence, encode_json(build_frame_document(result)) + b"\n", headers)
            if len(self._response_cache) >= _MAX_CACHED_RESPONSES:
                self._response_cache.clear()
            self._response_cache[camera] = kept
        return web.Response(body=kept[1], headers=kept[2])

    async def snapshot(self, request: web.Request) -> web.Response:
        """``/api/v1/cameras/{name}/snapshot.jpg``."""
        name = request.match_info["name"]
        self._require_camera(name)
        options = JpegOptions(query_bool(request, "annotate"), _width_px(request))
        result = self._newest(name)
        try:
            jpeg = await self._jpeg_cache.jpeg(result, options)
        except SourceError as error:
            raise RequestError(503, str(error), code="no_picture", headers={"Retry-After": "1"}) from None
        return web.Response(body=jpeg, content_type="image/jpeg", headers=_frame_headers(result))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """``/api/v1/cameras/{name}/stream.mjpg``."""
        name = request.match_info["name"]
        self._require_camera(name)
        options = JpegOptions(annotated=True, width_px=_width_px(request))
        valid = self._access.stream_stop_signal
        with self._streams.acquire(get_client_key(request)):
            return await send_mjpeg(
                request, self.backend, name, jpeg_cache=self._jpeg_cache, options=options, stop_signal=valid
            )

    async def frames(self, request: web.Request) -> web.StreamResponse:
        """``/api/v1/frames``: server-sent events."""
        camera = query_text(request, "camera")
        if camera is not None:
            self._require_camera(camera)
        valid = self._access.stream_stop_signal
        with_events = query_bool(request, "events")
        comment = "frame objects and scene events follow" if with_events else "frame objects follow"
        with self._events.acquire(get_client_key(request)):
            async with self.backend.subscribe(camera, with_events=with_events) as frames:
                return await send_events(
                    request,
                    frames,
                    valid,
                    comment,
                    count_lost=lambda: frames.lost,
                    take_waiting=frames.take_waiting,
                )

    async def detect(self, request: web.Request) -> web.Response:
        """``POST /api/v1/detect``: a picture in, its frame object out."""
        model = request.query.get("model")
        async with AsyncExitStack() as held:
            # The place is taken before the body is read, so that many large uploads cannot fill the memory.
            held.enter_context(self.shared.permits.acquire())
            data = await read_upload(request)
            await held.enter_async_context(self.shared.memory.hold(estimate_decoding_bytes(data)))
            work = self._decode_and_detect(data, model, held.pop_all())
            del data
        return json_response(
            build_frame_document(await self.shared.detached_tasks.run(work), source="upload")
        )

    async def _decode_and_detect(self, data: bytes, model: str | None, held: AsyncExitStack) -> FrameResult:
        """Decode and analyse a picture; then release what is held for it."""
        async with held:
            picture = await self.shared.executor.run(partial(decode_upload, data))
            del data
            try:
                return await self.backend.detect(picture, model)
            except UnknownModelError as error:
                raise RequestError(404, str(error)) from None


class CachedDocument:
    """A document that takes time to make; requests that come close together get the same one.

    It is kept for ten times as long as it took to make, at most `max_s`. So a small document is nearly always
    made anew, and a large one takes about a tenth of the event loop's time.
    """

    def __init__(
        self, make: Callable[[], Document], max_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._max_s = max_s
        self._clock = clock
        self._until_s: float | None = None
        self._document: Document = {}
        self._body = b""

    def document(self) -> Document:
        """The document; callers must not change it."""
        begun_s = self._clock()
        if self._until_s is None or begun_s >= self._until_s:
            self._document, self._body = self._make(), b""
            now_s = self._clock()
            self._until_s = now_s + min(self._max_s, _CACHE_TIME_FACTOR * (now_s - begun_s))
        return self._document

    def body(self) -> bytes:
        """The document as one line of JSON."""
        document = self.document()
        self._body = self._body or encode_json(document) + b"\n"
        return self._body


def _stream_limit(limit: int, message: str) -> ConcurrencyLimit:
    """At most half of the places for one address: a reverse proxy is one address for all its clients."""
    return ConcurrencyLimit(limit, message, per_client=max(1, limit // 2))


def _health_response(document: HealthDocument | ReadinessDocument, reasons: list[str]) -> web.Response:
    if not reasons:
        return json_response(document.dump())
    document.reasons = [redact(reason) for reason in reasons]
    document.error = ErrorDetailsDocument(code=document.status, message="; ".join(document.reasons))
    return json_response(document.dump(), status=503, headers={"Retry-After": "2"})


def _no_frame_yet_error(name: str) -> RequestError:
    message = f"camera '{name}' has no analysed frame yet; /api/v1/cameras/{name} shows its state"
    return RequestError(503, message, code="no_frame_yet", headers={"Retry-After": "1"})


def _frame_headers(result: FrameResult) -> dict[str, str]:
    """Headers by which a client matches a picture to its frame object."""
    return {
        "X-Visionedge-Camera": result.frame.camera,
        "X-Visionedge-Sequence": str(result.frame.sequence),
        "X-Visionedge-Epoch": str(result.frame.epoch),
        "X-Visionedge-Captured-At": format_utc(result.frame.captured_utc),
    }


def _width_px(request: web.Request) -> int | None:
    return query_integer(request, "width", minimum=SNAPSHOT_MIN_PX, maximum=SNAPSHOT_MAX_PX)


# --- the page ----------------------------------------------------------------------------------------------


class DashboardPage:
    """The page at ``/``: one document with its styles and scripts inside, assembled once.

    It holds no data and no secret: its scripts fetch the data, with the token where there is one.
    """

    def __init__(self) -> None:
        folder = files("visionedge.web") / "page"
        style = (folder / "style.css").read_text(encoding="utf-8")
        scripts = ("stream.js", "scene.js", "tiles.js", "page.js", "doctor.js", "engine.js")
        script = "".join((folder / name).read_text(encoding="utf-8") for name in scripts)
        html = (folder / "index.html").read_text(encoding="utf-8")
        self._body = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script).encode()
        self._headers = {
            "Content-Security-Policy": _content_security_policy(style, script),
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
        }

    def answer(self, status: int = 200) -> web.Response:
        """The page. With status 401 it is the same page, and its script asks for the token."""
        headers = dict(self._headers)
        if status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="visionedge"'
        return web.Response(
            body=self._body, status=status, content_type="text/html", charset="utf-8", headers=headers
        )


def _content_security_policy(style: str, script: str) -> str:
    """Allow this style, this script, and data from the server of the page; nothing else."""
    return (
        f"default-src 'none'; script-src '{_csp_hash(script)}'; style-src '{_csp_hash(style)}'; "
        "img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
