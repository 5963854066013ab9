"""The listening server: start it, know its address, end it in time."""

import errno
import logging
from collections.abc import Iterable

from aiohttp import web

from visionedge.config.schema import HttpConfig
from visionedge.errors import UnavailableError
from visionedge.web.app import make_app
from visionedge.web.backend import ModuleView
from visionedge.web.connections import Connections
from visionedge.web.guard import Access
from visionedge.web.listener import Listener, most_connections

log = logging.getLogger(__name__)

_SHUTDOWN_S = 1.0
"""Streams end by themselves at once; a request that still runs after this is cancelled.

Shorter than the 2 s that `Service` gives to all of `Server.close`: else it would give up before this cancels.
"""


class Server:
    """HTTP for one module: ``server = await Server.start(view, http)`` … ``await server.close()``."""

    def __init__(
        self,
        runner: web.AppRunner,
        connections: Connections,
        listener: Listener,
        http: HttpConfig,
        access: Access,
    ) -> None:
        self._runner = runner
        self._connections = connections
        self._listener = listener
        self._http = http
        self._access = access

    def __repr__(self) -> str:
        return f"<Server {self.url} connections={len(self._connections)}>"

    @staticmethod
    async def start(view: ModuleView, http: HttpConfig, own_names: Iterable[str] = ()) -> "Server":
        """Listen and serve; `own_names` are names of this module that `http.names` need not list.

        Raises:
            UnavailableError: the address cannot be listened on, such as a port in use.
        """
        access = Access(http, own_names)
        app = make_app(view, access)
        # With cancellation a viewer that leaves frees its place at once, not at the next write.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - it was set up
        connections = Connections(runner.server, most_connections())
        try:
            listener = await _listen(connections, http)
        except UnavailableError:
            await runner.cleanup()
            raise
        _warn_if_open(http)
        return Server(runner, connections, listener, http, access)

    async def apply(self, http: HttpConfig) -> None:
        """Listen where another configuration says and ask for its token.

        Who is connected stays connected; streams end when the token changes.

        Raises:
            UnavailableError: the address cannot be listened on; everything stays as it was.
        """
        if (http.host, http.port) != (self._http.host, self._http.port):
            await self._move(http)
        self._access.change(http)
        if (http.host, http.token is None) != (self._http.host, self._http.token is None):
            _warn_if_open(http)
        self._http = http

    async def _move(self, http: HttpConfig) -> None:
        former = self._listener
        if http.port != self.port:
            self._listener = await _listen(self._connections, http)
            former.close()
            return
        # The same port: the two addresses may overlap, so the old one has to go first.
        before = self._http.model_copy(update={"port": self.port})
        former.close()
        try:
            self._listener = await _listen(self._connections, http)
        except UnavailableError:
            self._listener = await _listen(self._connections, before)
            raise

    @property
    def port(self) -> int:
        """The port it really listens on, also when 0 was asked for."""
        return self._listener.port

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(_bare(self._http.host), _bare(self._http.host))  # noqa: S104 - shown, not bound
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    async def close(self) -> None:
        """Stop listening, end the streams, let requests finish for a short time, then cancel them."""
        self._listener.close()
        self._connections.close()
        await self._runner.cleanup()


async def _listen(connections: Connections, http: HttpConfig) -> Listener:
    try:
        return await Listener.open(http.host, http.port, connections)
    except OSError as error:
        raise UnavailableError(_cannot_listen(http, error)) from None


def _warn_if_open(http: HttpConfig) -> None:
    if http.is_open:
        log.warning(
            "HTTP listens on %s without a token: every machine that reaches it sees pictures, status and log;"
            " set http.token (or VISIONEDGE_HTTP_TOKEN), or listen on 127.0.0.1",
            http.host,
        )


def _bare(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


def _cannot_listen(http: HttpConfig, error: OSError) -> str:
    where = f"http: cannot listen on {http.host}:{http.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: the port is in use; give another with --http HOST:PORT (port 0 takes any free one)"
    if error.errno == errno.EACCES:
        return f"{where}: not allowed; ports below 1024 need rights, give a higher one with --http HOST:PORT"
    reason = error.strerror or str(error)
    return f"{where}: {reason}; give an address of this machine with --http HOST:PORT"
