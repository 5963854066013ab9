"""Which requests are answered: those with the token; without a token, those under a known host name.

Requests from pages of other sites that change something or cost much are refused in both cases.
"""

import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping

from aiohttp import hdrs, web

from visionedge.config.schema import HttpConfig
from visionedge.web.responses import RequestError
from visionedge.web.streams import StopSignal

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Paths without a token: orchestrators that check the health have none."""

METRICS_PATH = "/metrics"

_SAFE_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
# These change nothing, but a doctor report takes seconds of a core, and a stream holds a place.
_COSTLY = re.compile(r"/api/v1/(doctor|frames|events/stream|cameras/[^/]*/stream\.mjpg)/?")
_MAX_HOST_CHARACTERS = 300
_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]/@]*)(:[0-9]{1,5})?")
# A name without a dot (localhost, a machine, a container) cannot be registered in the DNS.
_DOTLESS_NAME = re.compile(r"[a-z0-9_-]{1,63}")
_ORIGIN = re.compile(r"https?://(.*)")


class AccessControl:
    """The rules of one server; they may change while it runs. Loop only.

    `own_names` are names of this module that `http.names` need not list.
    """

    def __init__(self, http: HttpConfig, own_names: Iterable[str] = ()) -> None:
        self._own_names = frozenset(_normalize_name(name) for name in own_names)
        self._read(http)
        self.stream_stop_signal = StopSignal()
        """Ends the streams that were opened with the present token when the token changes."""

    def __repr__(self) -> str:
        return f"<AccessControl {'open' if self._token is None else 'token'} names={len(self._names)}>"

    def _read(self, http: HttpConfig) -> None:
        self._token = None if http.token is None else http.token.encode()
        self._open_paths = OPEN_PATHS | ({METRICS_PATH} if http.metrics_token is not None else set())
        self._names = self._own_names | {_normalize_name(name) for name in http.names}
        # The last host that was accepted: parsing a host costs as much as all other checks of a request.
        self._known_host: str | None = None

    def change(self, http: HttpConfig) -> None:
        """Change the token and the names."""
        before = self._token
        self._read(http)
        if self._token != before:
            ended, self.stream_stop_signal = self.stream_stop_signal, StopSignal()
            ended.set()

    def check(self, request: web.Request) -> None:
        """Refuse a request that may not be answered.

        Raises:
            RequestError: 403, its host name is not known or a page of another site sent it; 401, the token is
                missing or wrong.
        """
        has_no_secret = self._token is None or (
            request.path == METRICS_PATH and METRICS_PATH in self._open_paths
        )
        if has_no_secret and not self._is_known_host(request.headers.get(hdrs.HOST)):
            raise RequestError(
                403,
                "the name in the Host header is not known: use the IP address, or add the name to http.names",
                code="unknown_host",
            )
        if _is_costly(request) and not self._is_same_site(request.headers):
            raise RequestError(403, "a page of another site may not send this request", code="foreign_origin")
        if request.path not in self._open_paths and not self._is_authorized(
            request.headers.get(hdrs.AUTHORIZATION, "")
        ):
            raise unauthorized_error()

    def _is_authorized(self, authorization: str) -> bool:
        return self._token is None or _has_token(authorization, self._token)

    def _is_known_host(self, host: str | None) -> bool:
        """Whether the host is an address, a name without a dot, or one of the names.

        A foreign page can make its own name resolve to this machine (DNS rebinding), but its browser still
        sends that name, which has a dot, as all names have that can be registered in the DNS. Only HTTP/1.0
        requests may have no Host, and no browser sends those.
        """
        if host is None or host == self._known_host:
            return True
        name = _parse_host(host)
        if name is None or not (name in self._names or _DOTLESS_NAME.fullmatch(name) or _is_address(name)):
            return False
        self._known_host = host
        return True

    def _is_same_site(self, headers: Mapping[str, str]) -> bool:
        """Whether no page or a page of this module sent it; behind a proxy only the browser knows."""
        relation = headers.get("Sec-Fetch-Site")
        if relation is not None:
            return relation in ("same-origin", "none")
        origin = headers.get(hdrs.ORIGIN)
        if origin is None:
            return True
        found = _ORIGIN.fullmatch(origin[:_MAX_HOST_CHARACTERS])
        if found is None:
            return False
        return found[1].lower() == headers.get(hdrs.HOST, "").lower() or _parse_host(found[1]) in self._names


def unauthorized_error() -> RequestError:
    """The answer 401, with the header to send."""
    return RequestError(
        401,
        "this needs the token, in a header such as 'Authorization: Bearer <token>'",
        headers={"WWW-Authenticate": 'Bearer realm="visionedge"'},
    )


def own_names(environ: Mapping[str, str]) -> list[str]:
    """The names by which other modules and machines reach this module inside IoT Edge."""
    return [name for key in ("IOTEDGE_MODULEID", "IOTEDGE_GATEWAYHOSTNAME") if (name := environ.get(key))]


def get_client_key(request: web.Request) -> str:
    """The client, for limits per client: its IPv4 address, or its /64 network of IPv6."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0]) if peer else None
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)


def _has_token(authorization: str, token: bytes) -> bool:
    kind, _, given = authorization.partition(" ")
    # surrogateescape: the header may hold any bytes, and a wrong token must not raise UnicodeEncodeError.
    right = hmac.compare_digest(given.strip().encode(errors="surrogateescape"), token)
    return right and kind.lower() == "bearer"


def _is_costly(request: web.Request) -> bool:
    return (
        request.method not in _SAFE_METHODS
        or _COSTLY.fullmatch(request.path[:_MAX_HOST_CHARACTERS]) is not None
    )


def _parse_host(authority: str) -> str | None:
    """The host of ``HOST[:PORT]``; None where it is malformed."""
    found = _HOST.fullmatch(authority) if len(authority) <= _MAX_HOST_CHARACTERS else None
    return _normalize_name(found[1].strip("[]")) if found and found[1] else None


def _normalize_name(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
