"""The listening server: start it, know its address, end it in time."""

import asyncio
import errno

from aiohttp import web

from visionedge.config import HttpConfig
from visionedge.errors import UnavailableError
from visionedge.web.answers import Lock
from visionedge.web.app import API, make_app
from visionedge.web.door import Door
from visionedge.web.view import ModuleView

_SHUTDOWN_S = 2.0
"""Streams end by themselves at once; a request that still runs after this is cancelled."""


class Server:
    """HTTP for one module: ``server = await Server.start(view, http)`` … ``await server.close()``."""

    def __init__(
        self, runner: web.AppRunner, door: Door, listener: asyncio.Server, http: HttpConfig, lock: Lock
    ) -> None:
        self._runner = runner
        self._door = door
        self._listener = listener
        self._http = http
        self._lock = lock

    def __repr__(self) -> str:
        return f"<Server {self.url} visitors={len(self._door.visitors)}>"

    @staticmethod
    async def start(view: ModuleView, http: HttpConfig) -> "Server":
        """Listen and serve.

        Raises:
            UnavailableError: the address cannot be listened on, such as a port in use.
        """
        lock = Lock(http.token)
        app = make_app(view, lock)
        # With cancellation a viewer that leaves frees its place at once, not at the next write.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - it was set up
        door = Door(app[API], lock, runner.server)
        try:
            listener = await _listen(door, http)
        except UnavailableError:
            await runner.cleanup()
            raise
        return Server(runner, door, listener, http, lock)

    async def apply(self, http: HttpConfig) -> None:
        """Listen where another configuration says and ask for its token; who is connected stays connected.

        Raises:
            UnavailableError: the address cannot be listened on; everything stays as it was.
        """
        if (http.host, http.port) != (self._http.host, self._http.port):
            await self._move(http)
        self._lock.change(http.token)
        self._http = http

    async def _move(self, http: HttpConfig) -> None:
        former = self._listener
        if http.port != self.port:
            self._listener = await _listen(self._door, http)
            former.close()
            return
        # The same port: the two addresses may overlap, so the old one has to go first.
        before = self._http.model_copy(update={"port": self.port})
        former.close()
        try:
            self._listener = await _listen(self._door, http)
        except UnavailableError:
            self._listener = await _listen(self._door, before)
            raise

    @property
    def port(self) -> int:
        """The port it really listens on, also when 0 was asked for."""
        return int(self._listener.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._http.host, self._http.host)  # noqa: S104 - shown, not bound
        return f"http://{f'[{host}]' if ':' in host.strip('[]') and host[0] != '[' else host}:{self.port}/"

    async def close(self) -> None:
        """Stop listening, end the streams, let requests finish for a short time, then cancel them."""
        self._listener.close()
        self._door.close()
        await self._runner.cleanup()


async def _listen(door: Door, http: HttpConfig) -> asyncio.Server:
    try:
        return await asyncio.get_running_loop().create_server(door, http.host, http.port)
    except OSError as error:
        raise UnavailableError(_cannot_listen(http, error)) from None


def _cannot_listen(http: HttpConfig, error: OSError) -> str:
    where = f"http: cannot listen on {http.host}:{http.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: the port is in use; give another with --http HOST:PORT (port 0 takes any free one)"
    if error.errno == errno.EACCES:
        return f"{where}: not allowed; ports below 1024 need rights, give a higher one with --http HOST:PORT"
    reason = error.strerror or str(error)
    return f"{where}: {reason}; give an address of this machine with --http HOST:PORT"
