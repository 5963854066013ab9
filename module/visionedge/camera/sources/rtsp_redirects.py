"""Follows an RTSP camera's redirects before a decoder opens it: FFmpeg would follow them to any host."""

import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from visionedge.camera.sources import diagnosis
from visionedge.camera.sources.base import Limits
from visionedge.camera.sources.redirects import allowed, connected, joined, with_login
from visionedge.camera.sources.rtsp import Refusal, SilentError, describe
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError

_REDIRECTS_MOST = 5
_SCHEMES = ("rtsp", "rtsps")


@dataclass(frozen=True, slots=True)
class Found:
    """Where an RTSP address leads.

    `target` is what a decoder has to open, with the login if its server may get it. `described` is how that
    server answered DESCRIBE; None where the camera's own address gave no answer.
    """

    target: str
    described: Refusal | None


def follow(uri: CameraUri, limits: Limits) -> Found:
    """Ask for the description of a camera, and go where it redirects to.

    Every connection is closed before this returns: some cameras allow one only. If the camera's own address
    gives no answer, a decoder may still try it; its time is up if the answer took `open_timeout_s`.

    Raises:
        SourceError: a redirect leads where it is not followed, in a circle, or to a server without an answer.
    """
    name, origin = str(uri), urlsplit(uri.target)
    deadline_s = time.monotonic() + limits.open_timeout_s
    url = uri.target
    for hop in range(_REDIRECTS_MOST + 1):
        parts = urlsplit(url)
        try:
            described = _described(name, origin, parts, limits, deadline_s)
        except (OSError, ValueError, SilentError) as error:
            if hop == 0:
                return Found(url, None)
            raise SourceError(diagnosis.why_no_rtsp(name, parts, error, limits.open_timeout_s)) from None
        if not 300 <= described.status < 400:
            return Found(url, described)
        if not described.location:
            raise SourceError(diagnosis.no_address(name))
        url = joined(url, described.location)
        allowed(name, origin, url, _SCHEMES, limits.redirects)
        url = with_login(url, uri.target)
    raise SourceError(diagnosis.circle(name))


def _described(
    name: str, origin: SplitResult, parts: SplitResult, limits: Limits, deadline_s: float
) -> Refusal:
    left_s, tls = deadline_s - time.monotonic(), parts.scheme.lower() == "rtsps"
    if left_s <= 0:
        raise TimeoutError
    with connected(name, origin, parts, left_s, tls=tls, certificates=limits.certificates) as connection:
        return describe(connection, parts, deadline_s)
