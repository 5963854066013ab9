"""The application: routes, who may use them, and what every answer has in common."""

from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from visionedge.web.access_control import AccessControl
from visionedge.web.backend import Backend
from visionedge.web.connections import Connection
from visionedge.web.handlers import ApiHandlers
from visionedge.web.kserve import InferenceProtocol
from visionedge.web.kserve import build_routes as inference_routes
from visionedge.web.responses import RequestError, error_response, set_common_headers, to_request_error

_RESPONSE_STARTED = web.RequestKey("begun", bool)


def make_app(backend: Backend, access: AccessControl) -> web.Application:
    """The whole HTTP side of a module over its view. It owns two threads from start-up to clean-up."""
    api = ApiHandlers(backend, access)
    app = web.Application(middlewares=[_errors, _guard(access, api)])
    app.add_routes(build_routes(api))
    app.on_response_prepare.append(_common_headers)
    app.on_shutdown.append(_closing(api))
    app.cleanup_ctx.append(_lifetime(api))
    return app


def build_routes(api: ApiHandlers) -> list[web.RouteDef]:
    """Every path that is answered; `openapi.describe` and docs/http.md name each."""
    camera = "/api/v1/cameras/{name}"
    return [
        web.get("/", api.page),
        web.get("/healthz", api.healthz),
        web.get("/readyz", api.readyz),
        web.get("/metrics", api.metrics),
        web.get("/openapi.json", api.openapi),
        web.get("/api/v1/status", api.status),
        web.get("/api/v1/doctor", api.doctor),
        web.get("/api/v1/log", api.log),
        web.get("/api/v1/config/schema", api.schema),
        web.get("/api/v1/cameras", api.cameras),
        web.get(camera, api.camera),
        web.get(f"{camera}/frame", api.frame),
        web.get(f"{camera}/snapshot.jpg", api.snapshot),
        # Without HEAD: it would open a stream and send nothing.
        web.get(f"{camera}/stream.mjpg", api.stream, allow_head=False),
        web.get("/api/v1/frames", api.frames, allow_head=False),
        web.post("/api/v1/detect", api.detect),
        *inference_routes(InferenceProtocol(api.backend, api.shared)),
    ]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is answered in the one shape. The connection is at work meanwhile."""
    connection = request.protocol
    assert isinstance(connection, Connection)  # noqa: S101 - `server` makes no others
    connection.begin(request)
    try:
        return await handler(request)
    except Exception as error:
        if request.get(_RESPONSE_STARTED, False):
            raise  # half an answer is out; the server breaks the connection, which is all that is left
        return error_response(request.path, to_request_error(error, request))
    finally:
        connection.end()


def _guard(access: AccessControl, api: ApiHandlers) -> Middleware:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            access.check(request)
        except RequestError as problem:
            if problem.status == 401 and _is_browser(request):
                return api.sign_in()
            raise
        return await handler(request)

    return guard


def _is_browser(request: web.Request) -> bool:
    """Whether a person opens the page, who can type the token there."""
    is_page = request.path == "/" and request.method == hdrs.METH_GET
    return is_page and "text/html" in request.headers.get(hdrs.ACCEPT, "")


async def _common_headers(request: web.Request, response: web.StreamResponse) -> None:
    request[_RESPONSE_STARTED] = True
    set_common_headers(response.headers)


def _closing(api: ApiHandlers) -> Callable[[web.Application], Awaitable[None]]:
    async def closing(_app: web.Application) -> None:
        api.end_streams()

    return closing


def _lifetime(api: ApiHandlers) -> Callable[[web.Application], AsyncIterator[None]]:
    async def lifetime(_app: web.Application) -> AsyncIterator[None]:
        yield
        await api.close()

    return lifetime
