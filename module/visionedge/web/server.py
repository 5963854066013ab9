"""The listening server: start it, know its address, end it in time."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterable

from aiohttp import web

from visionedge.config.schema import HttpConfig
from visionedge.errors import UnavailableError
from visionedge.runtime.logs import LogLimiter
from visionedge.runtime.process_limits import descriptor_limit
from visionedge.web.access_control import AccessControl
from visionedge.web.app import make_app
from visionedge.web.backend import Backend
from visionedge.web.connections import CONNECTIONS_AT_ONCE, Connection, Connections

# Listening sockets: opened at every address of a name, and silent while there is no room.
#
# asyncio's own server would log a traceback for each connection that finds no descriptor, and it listens at
# `::` for IPv6 alone.


log = logging.getLogger(__name__)

_BACKLOG = 1024
"""The system keeps so many connections until they are accepted; the client of one more waits for 1 s."""
_ACCEPTS_AT_ONCE = 32
_PAUSE_S = 0.5
_IPV6_ANY = "::"

SocketAddress = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


def compute_max_connections() -> int:
    """So many connections leave descriptors for everything else."""
    return min(CONNECTIONS_AT_ONCE, descriptor_limit() // 2)


class HttpListener:
    """Takes connections at one host and port: ``await Listener.open(…)`` … ``close()``. Loop only.

    The last descriptors are left to the module: near the limit the connection that has waited longest for its
    client is closed, and new ones are left to the system for a moment.
    """

    def __init__(self, sockets: list[socket.socket], connections: Connections) -> None:
        self._sockets = sockets
        self._connections = connections
        self._limit = descriptor_limit()
        self._reserve = max(32, self._limit // 16)
        self._limiter = LogLimiter(log)
        self._resume: asyncio.TimerHandle | None = None
        self._accepting: set[asyncio.Task[None]] = set()
        self._listen()

    def __repr__(self) -> str:
        state = "paused" if self._resume else "listening"
        return f"<Listener port={self.port} {state}>"

    @staticmethod
    async def open(host: str, port: int, connections: Connections) -> "HttpListener":
        """Listen.

        Raises:
            OSError: the address cannot be listened on.
        """
        addresses = await _addresses(host, port)
        return HttpListener(_open_sockets(addresses, port), connections)

    @property
    def port(self) -> int:
        """The port it really listens on."""
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        """Listen no more; connections stay."""
        if self._resume is not None:
            self._resume.cancel()
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.remove_reader(each.fileno())
            each.close()

    def _listen(self) -> None:
        self._resume = None
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.add_reader(each.fileno(), self._accept, each)

    def _pause(self, reason: str) -> None:
        self._limiter.warning(f"HTTP takes no new connections for {_PAUSE_S:g} s: {reason}")
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.remove_reader(each.fileno())
        self._resume = loop.call_later(_PAUSE_S, self._listen)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, _peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._free_descriptor(error.strerror or str(error))
                return
            if not self._connections.check_free_space():
                connection.close()
                self._pause("all connections are in use")
                return
            is_scarce = connection.fileno() >= self._limit - self._reserve
            self._serve(connection)
            if is_scarce:
                # The system gives the lowest descriptor that is free, so nearly all are in use.
                self._free_descriptor(f"nearly all of {self._limit} file descriptors are in use")
                return

    def _free_descriptor(self, reason: str) -> None:
        """Get a descriptor back, which is free before the next connection is taken; if none can be, wait."""
        if not self._connections.drop_idlest():
            self._pause(reason)

    def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._connect(connection, self._connections.begin()))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def _connect(self, connection: socket.socket, protocol: Connection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
        except OSError as error:
            connection.close()
            self._connections.lost(protocol)
            self._limiter.warning(f"an HTTP connection could not be accepted: {error.strerror}")


async def _addresses(host: str, port: int) -> list[SocketAddress]:
    """Every address of a host, each once, in the system's order."""
    host = host.removeprefix("[").removesuffix("]")
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _open_sockets(addresses: list[SocketAddress], port: int) -> list[socket.socket]:
    """Listening sockets; an address that this machine does not have is left out if there is another."""
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        for family, address in addresses:
            # Where any free port will do, all addresses have to have the same.
            taken = int(sockets[0].getsockname()[1]) if sockets and port == 0 else port
            try:
                sockets.append(_open_listening_socket(family, (address[0], taken, *address[2:])))
            except OSError as error:
                # A port that is free at one address may be taken at another.
                is_other = port == 0 and bool(sockets) and error.errno == errno.EADDRINUSE
                if not is_other and error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
                continue
            opened.callback(sockets[-1].close)
        if not sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, "no such address")
        opened.pop_all()
        return sockets


def _open_listening_socket(family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # At all addresses IPv4 is meant as well; at one of IPv6 there is none.
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != _IPV6_ANY))
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


_SHUTDOWN_S = 1.0
"""Streams end by themselves at once; a request that still runs after this is cancelled.

Shorter than the 2 s that `Service` gives to all of `Server.close`: else it would give up before this cancels.
"""


class HttpServer:
    """HTTP for one module: ``server = await Server.start(view, http)`` … ``await server.close()``."""

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
        return f"<Server {self.url} connections={len(self._connections)}>"

    @staticmethod
    async def start(backend: Backend, http: HttpConfig, own_names: Iterable[str] = ()) -> "HttpServer":
        """Listen and serve; `own_names` are names of this module that `http.names` need not list.

        Raises:
            UnavailableError: the address cannot be listened on, such as a port in use.
        """
        access = AccessControl(http, own_names)
        app = make_app(backend, access)
        # With cancellation a viewer that leaves frees its place at once, not at the next write.
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
        """Listen where another configuration says and ask for its token.

        Who is connected stays connected; streams end when the token changes.

        Raises:
            UnavailableError: the address cannot be listened on; everything stays as it was.
        """
        if (http.host, http.port) != (self._http.host, self._http.port):
            await self._rebind(http)
        self._access.change(http)
        if (http.host, http.token is None) != (self._http.host, self._http.token is None):
            _warn_if_open(http)
        self._http = http

    async def _rebind(self, http: HttpConfig) -> None:
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
            "HTTP listens on %s without a token: every machine that reaches it sees pictures, status and log;"
            " set http.token (or VISIONEDGE_HTTP_TOKEN), or listen on 127.0.0.1",
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
