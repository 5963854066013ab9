"""Follows an RTSP camera's redirects before a decoder opens it: FFmpeg would follow them to any host."""

import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from visionedge.camera.sources import diagnosis
from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.redirects import check_redirect, connect_guarded, copy_login, resolve_location
from visionedge.camera.sources.rtsp import NoRtspReplyError, RtspResult, send_describe
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError

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
