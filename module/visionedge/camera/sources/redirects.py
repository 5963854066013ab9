"""Redirects of cameras: which ones are followed, for HTTP and RTSP alike, and following them for RTSP.

FFmpeg would follow an RTSP redirect to any host, so `resolve_rtsp_redirects` does it before a decoder opens.
"""

import ipaddress
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from visionedge.camera.sources.base import RedirectPolicy, SourceLimits
from visionedge.camera.sources.diagnosis import SourceFault, diagnose_rtsp_error
from visionedge.camera.sources.network import connect, strip_login
from visionedge.camera.sources.rtsp import NoRtspReplyError, RtspResult, send_describe
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError

_MAX_RTSP_REDIRECTS = 5
_RTSP_SCHEMES = ("rtsp", "rtsps")


def resolve_location(url: str, where: str) -> str:
    """Return the absolute address of a `Location` header in an answer from `url`."""
    try:
        return urljoin(url, where)
    except ValueError:
        return where  # `check_redirect` refuses it


def check_redirect(
    name: str, origin: SplitResult, url: str, schemes: tuple[str, ...], redirects: RedirectPolicy
) -> SplitResult:
    """Check the address of a redirect and return its parts.

    Args:
        name: the camera's address without secrets.
        origin: the camera's own address.
        url: the address of the redirect.
        schemes: the schemes that are followed.
        redirects: the hosts that are followed.

    Raises:
        SourceError: the redirect is not followed.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is not a number
    except ValueError:
        raise SourceFault.REDIRECT_WITHOUT_ADDRESS.error(name) from None
    if parts.scheme.lower() not in schemes or not parts.hostname:
        raise SourceFault.REDIRECT_TO_OTHER_SCHEME.error(name, scheme=parts.scheme[:20])
    if parts.hostname != origin.hostname and redirects != "any":
        raise SourceFault.REDIRECT_TO_OTHER_HOST.error(name, host=parts.hostname)
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
    """Connect to an address that passed `check_redirect`, but never to this machine or a link-local address.

    The camera's own address may be local.

    Raises:
        OSError: no connection, or the certificate is not trusted.
        SourceError: another host has a local address, or the file of certificates cannot be read.
    """
    other = parts.hostname != origin.hostname
    if other:
        found = socket.getaddrinfo(parts.hostname, None, proto=socket.IPPROTO_TCP)
        _refuse_local(name, origin, parts, (str(place[4][0]) for place in found))
    if tls and certificates is not None and not os.access(certificates, os.R_OK):
        raise SourceFault.UNREADABLE_CERTIFICATES.error(name, file=certificates)
    connection = connect(parts, timeout_s, tls=tls, certificates=certificates)
    try:
        if other:  # DNS may return another address by now
            _refuse_local(name, origin, parts, [str(connection.getpeername()[0])])
    except BaseException:
        connection.close()
        raise
    return connection


def copy_login(url: str, target: str) -> str:
    """Return `url` with the login of `target`, if it is the same host and not less secure.

    The login of a TLS address is not sent without TLS. A login in `url` itself is removed.
    """
    parts, origin = urlsplit(strip_login(url)), urlsplit(target)
    login, at, _ = origin.netloc.rpartition("@")
    secure_enough = parts.scheme.lower().startswith(origin.scheme.lower())  # the same, or with TLS
    if not at or parts.hostname != origin.hostname or not secure_enough:
        return parts.geturl()
    return parts._replace(netloc=f"{login}@{parts.netloc}").geturl()


def _refuse_local(name: str, origin: SplitResult, parts: SplitResult, addresses: Iterable[str]) -> None:
    """Refuse another host on this machine or a link-local address, such as a cloud's metadata service."""
    own = socket.getaddrinfo(origin.hostname, None, proto=socket.IPPROTO_TCP)
    is_origin_loopback = _address(str(own[0][4][0])).is_loopback
    for address in map(_address, addresses):
        if address.is_link_local or (address.is_loopback and not is_origin_loopback):
            raise SourceFault.REDIRECT_TO_LOCAL_HOST.error(name, host=parts.hostname or "")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@dataclass(frozen=True, slots=True)
class RtspTarget:
    """The end of a chain of RTSP redirects.

    `target` is the address for the decoder, with the login if its server may get it. `describe_reply` is that
    server's answer to DESCRIBE; None if the camera's own address did not answer.
    """

    target: str
    describe_reply: RtspResult | None


def resolve_rtsp_redirects(uri: CameraUri, limits: SourceLimits) -> RtspTarget:
    """Send DESCRIBE to a camera and follow its redirects.

    Every connection is closed before this returns, because some cameras allow only one. If the camera's own
    address does not answer, a decoder may still try it in the rest of `open_timeout_s`.

    Raises:
        SourceError: a redirect is not followed, loops, or leads to a server that does not answer.
    """
    name, origin = str(uri), urlsplit(uri.target)
    deadline_s = time.monotonic() + limits.open_timeout_s
    url = uri.target
    for hop in range(_MAX_RTSP_REDIRECTS + 1):
        parts = urlsplit(url)
        try:
            describe_reply = _describe(name, origin, parts, limits, deadline_s)
        except (OSError, ValueError, NoRtspReplyError) as error:
            if hop == 0:
                return RtspTarget(url, None)
            raise SourceError(diagnose_rtsp_error(name, parts, error, limits.open_timeout_s)) from None
        if not 300 <= describe_reply.status < 400:
            return RtspTarget(url, describe_reply)
        if not describe_reply.location:
            raise SourceFault.REDIRECT_WITHOUT_ADDRESS.error(name)
        url = resolve_location(url, describe_reply.location)
        check_redirect(name, origin, url, _RTSP_SCHEMES, limits.redirects)
        url = copy_login(url, uri.target)
    raise SourceFault.REDIRECT_LOOP.error(name)


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
