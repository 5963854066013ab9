"""Where a camera may send us with a redirect: one rule for HTTP and RTSP."""

import ipaddress
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from visionedge.camera.sources import diagnosis
from visionedge.camera.sources.base import RedirectPolicy, SourceLimits
from visionedge.camera.sources.network import connect, strip_login
from visionedge.camera.sources.rtsp import NoRtspReplyError, RtspResult, send_describe
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError


def resolve_location(url: str, where: str) -> str:
    """The address that a `Location` names, seen from `url`."""
    try:
        return urljoin(url, where)
    except ValueError:
        return where  # which is looked at next


def check_redirect(
    name: str, origin: SplitResult, url: str, schemes: tuple[str, ...], redirects: RedirectPolicy
) -> SplitResult:
    """The parts of an address that the camera may send us to.

    Args:
        name: the camera, as it may be shown.
        origin: the camera's own address.
        url: where it sends us.
        schemes: those that are followed.
        redirects: which hosts it may lead to.

    Raises:
        SourceError: it may not be followed.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        raise SourceError(diagnosis.redirect_without_address(name)) from None
    if parts.scheme.lower() not in schemes or not parts.hostname:
        raise SourceError(diagnosis.redirect_to_other_scheme(name, parts.scheme))
    if parts.hostname != origin.hostname and redirects != "any":
        raise SourceError(diagnosis.redirect_to_other_host(name, parts.hostname))
    return parts


def connect_guarded(
    name: str,
    origin: SplitResult,
    parts: SplitResult,
    timeout_s: float,
    *,
    tls: bool,
    certificates: str | None,
) -> socket.socket:
    """A connection to an address that is allowed; one to another host only where that is no inner host.

    Raises:
        OSError: there is none, or its certificate is not trusted.
        SourceError: the other host is this machine or a link-local one, or no certificates can be read.
    """
    other = parts.hostname != origin.hostname
    if other:
        found = socket.getaddrinfo(parts.hostname, None, proto=socket.IPPROTO_TCP)
        _refuse_local(name, origin, parts, (str(place[4][0]) for place in found))
    if tls and certificates is not None and not os.access(certificates, os.R_OK):
        raise SourceError(diagnosis.unreadable_certificates(name, certificates))
    connection = connect(parts, timeout_s, tls=tls, certificates=certificates)
    try:
        if other:  # the name may mean another address by now
            _refuse_local(name, origin, parts, [str(connection.getpeername()[0])])
    except BaseException:
        connection.close()
        raise
    return connection


def copy_login(url: str, target: str) -> str:
    """The address that the camera led to, with the login only if it is at the same host.

    A login that was meant for TLS is not sent without it. A login in `url` itself is left out.
    """
    parts, origin = urlsplit(strip_login(url)), urlsplit(target)
    login, at, _ = origin.netloc.rpartition("@")
    secure_enough = parts.scheme.lower().startswith(origin.scheme.lower())  # the same, or with TLS
    if not at or parts.hostname != origin.hostname or not secure_enough:
        return parts.geturl()
    return parts._replace(netloc=f"{login}@{parts.netloc}").geturl()


def _refuse_local(name: str, origin: SplitResult, parts: SplitResult, addresses: Iterable[str]) -> None:
    """Another host may not be this machine or a link-local one, such as a cloud's metadata service."""
    own = socket.getaddrinfo(origin.hostname, None, proto=socket.IPPROTO_TCP)
    is_origin_loopback = _address(str(own[0][4][0])).is_loopback
    for address in map(_address, addresses):
        if address.is_link_local or (address.is_loopback and not is_origin_loopback):
            raise SourceError(diagnosis.redirect_to_local_host(name, parts.hostname or ""))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


# Follows an RTSP camera's redirects before a decoder opens it: FFmpeg would follow them to any host.


_MAX_REDIRECTS = 5
_SCHEMES = ("rtsp", "rtsps")


@dataclass(frozen=True, slots=True)
class RtspTarget:
    """Where an RTSP address leads.

    `target` is what a decoder has to open, with the login if its server may get it. `described` is how that
    server answered DESCRIBE; None where the camera's own address gave no answer.
    """

    target: str
    describe_reply: RtspResult | None


def resolve_rtsp_redirects(uri: CameraUri, limits: SourceLimits) -> RtspTarget:
    """Ask for the description of a camera, and go where it redirects to.

    Every connection is closed before this returns: some cameras allow one only. If the camera's own address
    gives no answer, a decoder may still try it; its time is up if the answer took `open_timeout_s`.

    Raises:
        SourceError: a redirect leads where it is not followed, in a circle, or to a server without an answer.
    """
    name, origin = str(uri), urlsplit(uri.target)
    deadline_s = time.monotonic() + limits.open_timeout_s
    url = uri.target
    for hop in range(_MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        try:
            describe_reply = _describe(name, origin, parts, limits, deadline_s)
        except (OSError, ValueError, NoRtspReplyError) as error:
            if hop == 0:
                return RtspTarget(url, None)
            raise SourceError(
                diagnosis.diagnose_rtsp_error(name, parts, error, limits.open_timeout_s)
            ) from None
        if not 300 <= describe_reply.status < 400:
            return RtspTarget(url, describe_reply)
        if not describe_reply.location:
            raise SourceError(diagnosis.redirect_without_address(name))
        url = resolve_location(url, describe_reply.location)
        check_redirect(name, origin, url, _SCHEMES, limits.redirects)
        url = copy_login(url, uri.target)
    raise SourceError(diagnosis.redirect_loop(name))


def _describe(
    name: str, origin: SplitResult, parts: SplitResult, limits: SourceLimits, deadline_s: float
) -> RtspResult:
    left_s, tls = deadline_s - time.monotonic(), parts.scheme.lower() == "rtsps"
    if left_s <= 0:
        raise TimeoutError
    with connect_guarded(
        name, origin, parts, left_s, tls=tls, certificates=limits.certificates
    ) as connection:
        return send_describe(connection, parts, deadline_s)
