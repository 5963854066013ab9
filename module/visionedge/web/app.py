"""The application: routes, who may use them, and what every answer has in common."""

from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from visionedge.web.answers import Lock, RequestError, error_answer, problem_of, set_common_headers
from visionedge.web.api import Api
from visionedge.web.inference_protocol import InferenceProtocol
from visionedge.web.inference_protocol import routes as inference_routes
from visionedge.web.view import ModuleView

_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""What needs no token: orchestrators ask here and have none."""

API = web.AppKey("api", Api)
"""The handlers of an application, for the door in front of it."""

_BEGUN = web.RequestKey("begun", bool)


def make_app(view: ModuleView, lock: Lock) -> web.Application:
    """The whole HTTP side of a module over its view. It owns two threads from start-up to clean-up."""
    api = Api(view)
    app = web.Application(middlewares=[_errors, _guard(lock, api)])
    app[API] = api
    app.add_routes(routes(api))
    app.on_response_prepare.append(_common_headers)
    app.on_shutdown.append(_closing(api))
    app.cleanup_ctx.append(_lifetime(api))
    return app


def routes(api: Api) -> list[web.RouteDef]:
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
        *inference_routes(InferenceProtocol(api.view, api.desk, api.uploads)),
    ]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is answered in the one shape."""
    try:
        return await handler(request)
    except Exception as error:
        if request.get(_BEGUN, False):
            raise  # half an answer is out; the server breaks the connection, which is all that is left
        return error_answer(request.path, problem_of(error, request))


def _guard(lock: Lock, api: Api) -> Middleware:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _OPEN_PATHS or lock.opens(request.headers.get("Authorization", "")):
            return await handler(request)
        if (
            request.path == "/"
            and request.method == "GET"
            and "text/html" in request.headers.get("Accept", "")
        ):
            return api.sign_in()
        headers = {"WWW-Authenticate": 'Bearer realm="visionedge"'}
        raise RequestError(401, "this needs the header 'Authorization: Bearer TOKEN'", headers=headers)

    return guard


async def _common_headers(request: web.Request, response: web.StreamResponse) -> None:
    request[_BEGUN] = True
    set_common_headers(response.headers)


def _closing(api: Api) -> Callable[[web.Application], Awaitable[None]]:
    async def closing(_app: web.Application) -> None:
        api.closing.set()

    return closing


def _lifetime(api: Api) -> Callable[[web.Application], AsyncIterator[None]]:
    async def lifetime(_app: web.Application) -> AsyncIterator[None]:
        yield
        api.desk.close()

    return lifetime
