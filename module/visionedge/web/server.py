"""The HTTP server: the listening server of a module, and the application with its routes and middleware."""

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from visionedge.config.schema import HttpConfig
from visionedge.errors import UnavailableError
from visionedge.web.access_control import AccessControl
from visionedge.web.backend import Backend
from visionedge.web.connections import Connection, Connections, HttpListener, compute_max_connections
from visionedge.web.handlers import ApiHandlers
from visionedge.web.kserve import InferenceProtocol
from visionedge.web.kserve import build_routes as inference_routes
from visionedge.web.responses import RequestError, error_response, set_common_headers, to_request_error

log = logging.getLogger(__name__)

_SHUTDOWN_S = 1.0
"""Requests that still run after this are cancelled. `Service` gives `HttpServer.close` 2 s in all."""

_RESPONSE_STARTED = web.RequestKey("begun", bool)


class HttpServer:
    """HTTP for one module: ``server = await HttpServer.start(backend, http)`` … ``await server.close()``."""

    def __init__(
        self,
        runner: web.AppRunner,
        connections: Connections,
        listener: HttpListener,
        http: HttpConfig,
        access: AccessControl,
    ) -> None:
        self._runner = runner
        self._connections = connections
        self._listener = listener
        self._http = http
        self._access = access

    def __repr__(self) -> str:
        return f"<HttpServer {self.url} connections={len(self._connections)}>"

    @staticmethod
    async def start(backend: Backend, http: HttpConfig, own_names: Iterable[str] = ()) -> "HttpServer":
        """Listen and serve; `own_names` are names of this module that `http.names` need not list.

        Raises:
            UnavailableError: the address cannot be listened on, such as a port in use.
        """
        access = AccessControl(http, own_names)
        app = make_app(backend, access)
        # With cancellation a viewer that disconnects frees its place at once, not at the next write.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - it was set up
        connections = Connections(runner.server, compute_max_connections())
        try:
            listener = await _listen(connections, http)
        except UnavailableError:
            await runner.cleanup()
            raise
        _warn_if_open(http)
        return HttpServer(runner, connections, listener, http, access)

    async def apply(self, http: HttpConfig) -> None:
        """Change to another address, token and names.

        Open connections stay; streams end when the token changes.

        Raises:
            UnavailableError: the address cannot be listened on; nothing changes.
        """
        if (http.host, http.port) != (self._http.host, self._http.port):
            await self._rebind(http)
        self._access.change(http)
        if (http.host, http.is_open) != (self._http.host, self._http.is_open):
            _warn_if_open(http)
        self._http = http

    async def _rebind(self, http: HttpConfig) -> None:
        former = self._listener
        if http.port != self.port:
            self._listener = await _listen(self._connections, http)
            former.close()
            return
        # With the same port the two addresses may overlap, so the old listener is closed first.
        before = self._http.model_copy(update={"port": self.port})
        former.close()
        try:
            self._listener = await _listen(self._connections, http)
        except UnavailableError:
            self._listener = await _listen(self._connections, before)
            raise

    @property
    def port(self) -> int:
        """The port it listens on, also when 0 was given."""
        return self._listener.port

    @property
    def url(self) -> str:
        """The address of the page for a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(  # noqa: S104 - shown, not bound
            _strip_brackets(self._http.host), _strip_brackets(self._http.host)
        )
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    async def close(self) -> None:
        """Stop listening, end the streams, let requests finish for a short time, then cancel them."""
        self._listener.close()
        self._connections.close()
        await self._runner.cleanup()


async def _listen(connections: Connections, http: HttpConfig) -> HttpListener:
    try:
        return await HttpListener.open(http.host, http.port, connections)
    except OSError as error:
        raise UnavailableError(_cannot_listen(http, error)) from None


def _warn_if_open(http: HttpConfig) -> None:
    if http.is_open:
        log.warning(
            "HTTP listens on %s without a token (http.allowAnonymous): every machine that reaches it sees"
            " pictures, status and log; set http.token (or VISIONEDGE_HTTP_TOKEN), or listen on 127.0.0.1",
            http.host,
        )


def _strip_brackets(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


def _cannot_listen(http: HttpConfig, error: OSError) -> str:
    where = f"http: cannot listen on {http.host}:{http.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: the port is in use; give another with --http HOST:PORT (port 0 takes any free one)"
    if error.errno == errno.EACCES:
        return f"{where}: not allowed; ports below 1024 need rights, give a higher one with --http HOST:PORT"
    reason = error.strerror or str(error)
    return f"{where}: {reason}; give an address of this machine with --http HOST:PORT"


# --- the application ---------------------------------------------------------------------------------------


def make_app(backend: Backend, access: AccessControl) -> web.Application:
    """The aiohttp application over a backend. It owns two threads from start-up to clean-up."""
    api = ApiHandlers(backend, access)
    app = web.Application(middlewares=[_errors, _guard(access, api)])
    app.add_routes(build_routes(api))
    app.on_response_prepare.append(_common_headers)
    app.on_shutdown.append(_closing(api))
    app.cleanup_ctx.append(_lifetime(api))
    return app


def build_routes(api: ApiHandlers) -> list[web.RouteDef]:
    """Every path that is answered; /openapi.json and docs/http.md name each."""
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
        web.get(f"{camera}/scene", api.scene),
        web.get(f"{camera}/counts", api.scene_counts),
        web.get(f"{camera}/frame", api.frame),
        web.get(f"{camera}/snapshot.jpg", api.snapshot),
        # Without HEAD: it would open a stream and send nothing.
        web.get(f"{camera}/stream.mjpg", api.stream, allow_head=False),
        web.get("/api/v1/frames", api.frames, allow_head=False),
        web.get("/api/v1/events", api.scene_events),
        web.get("/api/v1/events/stream", api.scene_event_stream, allow_head=False),
        web.post("/api/v1/detect", api.detect),
        *inference_routes(InferenceProtocol(api.backend, api.shared)),
    ]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error in the one shape; mark the connection as answering meanwhile."""
    connection = request.protocol
    assert isinstance(connection, Connection)  # noqa: S101 - the listener makes no others
    connection.begin(request)
    try:
        return await handler(request)
    except Exception as error:
        if request.get(_RESPONSE_STARTED, False):
            raise  # a part of the answer is sent: the server can only close the connection
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
    """Whether a browser opens the page, where a person can enter the token."""
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
