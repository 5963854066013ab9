"""Opens an HTTP address of a camera: what it is shows in the answer, never in the path alone."""

import contextlib
import re
import time
from collections.abc import Callable
from typing import Literal

from visionedge.camera.sources import diagnosis
from visionedge.camera.sources.base import Limits, Source
from visionedge.camera.sources.http_client import Answer, Head, HttpClient
from visionedge.camera.sources.http_pictures import HttpPictures, refusal
from visionedge.camera.sources.redirects import with_login
from visionedge.config.addresses import CameraUri
from visionedge.errors import SourceError

_BEGIN_BYTES = 512
_BEGIN_S = 1.0
_JPEG = b"\xff\xd8\xff"
_OTHER_PICTURES = (b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")
_PART = re.compile(rb"\s*(?:--|content-(?:type|length)\s*:)", re.IGNORECASE)
_TEXT = re.compile(r"text/|.*\b(?:html|json|xml|javascript)\b")

Kind = Literal["jpeg", "still", "playlist", "media", "page"]

OpenMedia = Callable[[str, Limits, bool], Source]
"""Opens what is no picture: (its address with the login, limits, whether it is a playlist)."""


def open_http(uri: CameraUri, limits: Limits, open_media: OpenMedia) -> Source:
    """Open an HTTP address.

    Raises:
        SourceError: it cannot be opened; one line with the reason and the remedy.
    """
    deadline_s = time.monotonic() + limits.open_timeout_s
    client = HttpClient(uri.target, limits)
    with contextlib.ExitStack() as failing:
        failing.callback(client.close)
        answer = client.get()
        multipart = answer.head.content_type.startswith("multipart/")
        begin = b"" if multipart or answer.head.status >= 300 else _beginning(answer, deadline_s)
        kind = kind_of(answer.head, begin)
        _refuse(client, answer, kind, begin)
        if kind in ("jpeg", "still"):
            pictures = HttpPictures(client, answer, begin, limits, jpeg=kind == "jpeg")
            if not multipart:
                pictures.settle(deadline_s)
            failing.pop_all()
            return pictures
    return open_media(with_login(answer.url, uri.target), limits, kind == "playlist")


def _refuse(client: HttpClient, answer: Answer, kind: Kind, begin: bytes) -> None:
    """Raise the reason where there is no picture in this answer."""
    if answer.head.status >= 300:
        raise SourceError(refusal(client, answer))
    if kind == "page" and not begin.strip():
        raise SourceError(diagnosis.empty(client.name))
    if kind == "page":
        raise SourceError(diagnosis.web_page(client.name, answer.head.content_type))


def kind_of(head: Head, begin: bytes) -> Kind:
    """What an answer is, from its media type and the first bytes of its body."""
    media = head.content_type
    if media.startswith("multipart/") or begin.startswith(_JPEG) or _PART.match(begin):
        return "jpeg"
    if begin.startswith(_OTHER_PICTURES) or (begin[:4] == b"RIFF" and begin[8:12] == b"WEBP"):
        return "still"
    if media == "application/dash+xml" or begin.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"#EXTM3U"):
        return "playlist"
    # Something stands before the first part; in the head of a video file these bytes would be chance.
    if "jpeg" in media or "jpg" in media or (_JPEG in begin and not media.startswith("video/")):
        return "jpeg"
    return "page" if _is_text(media, begin) else "media"


def _is_text(media: str, begin: bytes) -> bool:
    """Whether it is for people or programs; nothing at all is, too."""
    begins = begin.lstrip(b"\xef\xbb\xbf \t\r\n")
    return begins[:1] in (b"", b"<", b"{", b"[") or (_TEXT.match(media) is not None and begin.isascii())


def _beginning(answer: Answer, deadline_s: float) -> bytes:
    begin, wait_s = b"", deadline_s - time.monotonic()
    while len(begin) < _BEGIN_BYTES and not answer.over:
        try:
            begin += answer.read(max(0.1, wait_s))
        except TimeoutError:
            break
        wait_s = min(_BEGIN_S, deadline_s - time.monotonic())
    return begin
