"""The containers and codecs that a source may have. FFmpeg has hundreds more, and attackers use rare ones.

FFmpeg's own lists (`ffmpeg_options`) keep it from opening others while it analyses a source.
`check_container` and `check_codec` refuse a source with the reason, before a picture is decoded.

A local file is never a playlist or a description of streams (HLS, DASH, SDP, concat): these open other files
and addresses.
"""

import ctypes
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from visionedge.camera.sources.base import SourceLimits
from visionedge.camera.sources.diagnosis import SourceFault
from visionedge.errors import UnsupportedFormatError

SourceKind = Literal["file", "rtsp", "http", "playlist"]
"""How FFmpeg gets the data: `playlist` is HLS or DASH over HTTP."""

CODECS = (
    "h264",
    "hevc",
    "mjpeg",
    "av1",
    "vp8",
    "vp9",
    "mpeg2video",
    "mpeg4",
    "msmpeg4v3",  # DivX 3: most AVI files of that time, such as OpenCV's sample
    "dvvideo",
    "prores",
    "rawvideo",
    "png",  # also the cover of a file
)
"""FFmpeg's names of the codecs that are always allowed."""


CONTAINERS = (
    *("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "live_flv", "dv"),
    # A codec's own data, without a container.
    *("h264", "hevc", "mjpeg", "mpjpeg", "m4v", "mpegvideo", "ivf", "obu", "av1", "yuv4mpegpipe"),
)
"""FFmpeg's names of the containers that are always allowed, in files and over HTTP."""

# Sound and subtitles of a playlist are in other files; FFmpeg refuses the playlist if it cannot open one.
_PLAYLIST_CONTAINERS = (*CONTAINERS, "hls", "dash", "aac", "ac3", "eac3", "mp3", "webvtt")

_CONTAINERS: Mapping[SourceKind, tuple[str, ...]] = {
    "file": CONTAINERS,
    "http": CONTAINERS,
    "playlist": _PLAYLIST_CONTAINERS,
    "rtsp": ("rtsp",),
}
_PROTOCOLS: Mapping[SourceKind, str] = {
    "file": "file",
    "http": "http,https,tcp,tls",
    "playlist": "http,https,tcp,tls,crypto,data",
    "rtsp": "rtp,srtp,udp,tcp,tls",
}

PROBE_BYTES = 64 << 10
_PADDING_BYTES = 32
_MIN_SCORE = 50
"""FFmpeg's score of a container whose file name or beginning is its own; below it the guess is weak."""

# Tags that are numbers: the stream types of MPEG-TS, and the codecs of FLV.
_NUMERIC_TAGS: Mapping[int, str] = {
    0x01: "mpeg2video",
    0x02: "mpeg2video",
    0x07: "h264",
    0x10: "mpeg4",
    0x1B: "h264",
    0x24: "hevc",
}

_NOT_ALLOWED = re.compile(r"Codec \((\w+)\) not on whitelist")
_VIDEO = 0
"""FFmpeg's number of the media type."""


def ffmpeg_options(kind: SourceKind, limits: SourceLimits) -> dict[str, str]:
    """Return the options by which FFmpeg opens no other container, codec or protocol."""
    return {
        "codec_whitelist": ",".join(filter(None, map(_decoder_of_codec, allowed_codecs(limits)))),
        "format_whitelist": ",".join((*_CONTAINERS[kind], *limits.extra_containers)),
        "protocol_whitelist": _PROTOCOLS[kind],
    }


def allowed_codecs(limits: SourceLimits) -> tuple[str, ...]:
    """Return FFmpeg's names of the allowed codecs."""
    return (*CODECS, *limits.extra_codecs)


def check_container(data: bytes, name: str, limits: SourceLimits, path: Path | None = None) -> None:
    """Refuse data that begin like a container that is not allowed.

    Args:
        data: the first bytes of the source.
        name: the source without secrets.
        limits: with the additional containers.
        path: the file; FFmpeg also judges its name.

    Raises:
        UnsupportedFormatError: the container is not allowed.
    """
    container = recognise_container(data, path)
    allowed = {*CONTAINERS, *limits.extra_containers}
    if container is not None and not allowed & set(container.split(",")):
        refused = SourceFault.CONTAINER_NOT_ALLOWED.describe(name, container=container.partition(",")[0])
        raise UnsupportedFormatError(refused)


def check_codec(codec: str | None, name: str, limits: SourceLimits) -> None:
    """Refuse a codec that is not allowed.

    Args:
        codec: FFmpeg's name of it; None: FFmpeg does not know it.
        name: the source without secrets.
        limits: with the additional codecs.

    Raises:
        UnsupportedFormatError: the codec is not allowed.
    """
    if codec not in allowed_codecs(limits):
        refused = SourceFault.CODEC_NOT_ALLOWED.describe(name, codec=codec or "unknown")
        raise UnsupportedFormatError(refused)


def check_opencv_codec(tag: int, messages: Iterable[str], name: str, limits: SourceLimits) -> None:
    """Refuse the codec of a source that OpenCV has opened.

    OpenCV opens the decoder of any codec and does not report its name. Two signs show it: FFmpeg reported
    that it did not open the decoder while it analysed the source, or the stream has the tag of another codec.

    Args:
        tag: the stream's tag (FOURCC); 0: it has none.
        messages: FFmpeg's error messages while the source was opened.
        name: the source without secrets.
        limits: with the additional codecs.

    Raises:
        UnsupportedFormatError: the codec is not allowed.
    """
    for message in messages:
        refused = _NOT_ALLOWED.search(message)
        if refused is not None and (codec := _codec_of_video_decoder(refused[1])) is not None:
            check_codec(codec, name, limits)
    if tag:
        check_codec(_codec_of_tag(tag) or _printable_tag(tag), name, limits)


def _printable_tag(tag: int) -> str:
    text = tag.to_bytes(4, "little").decode("latin-1")
    return text if re.fullmatch(r"[A-Za-z0-9 ]{4}", text) else f"tag {tag:#x}"


# --- FFmpeg's own tables ------------------------------------------------------------------------------------


class _ProbeData(ctypes.Structure):
    """FFmpeg's AVProbeData."""

    _fields_ = (
        ("filename", ctypes.c_char_p),
        ("buf", ctypes.c_char_p),
        ("buf_size", ctypes.c_int),
        ("mime_type", ctypes.c_char_p),
    )


class _Decoder(ctypes.Structure):
    """The first fields of FFmpeg's AVCodec."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("long_name", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("id", ctypes.c_int),
    )


@lru_cache(maxsize=2)
def _library(name: str) -> ctypes.CDLL:
    """Return a library of the FFmpeg that this process has loaded; OpenCV always loads one."""
    import cv2  # noqa: F401 - loads it

    pattern = re.compile(rf"(/\S*/lib{name}[^/\s]*)$", re.MULTILINE)
    return ctypes.CDLL(min(pattern.findall(Path("/proc/self/maps").read_text())))


def recognise_container(data: bytes, path: Path | None = None) -> str | None:
    """Return FFmpeg's name of the container that data begin with; None if it is not sure. Opens nothing."""
    formats = _library("avformat")
    formats.av_probe_input_format2.restype = ctypes.POINTER(ctypes.c_char_p)
    probe = _ProbeData(
        str(path or "").encode(errors="surrogateescape"), data + bytes(_PADDING_BYTES), len(data)
    )
    score = ctypes.c_int(_MIN_SCORE - 1)
    found = formats.av_probe_input_format2(ctypes.byref(probe), 1, ctypes.byref(score))
    name: bytes | None = found[0] if found else None  # the first field of FFmpeg's AVInputFormat
    return None if name is None else name.decode("ascii", "replace")


def _codec_of_tag(tag: int) -> str | None:
    """Return the codec that a tag means in AVI, MP4, MPEG-TS and FLV."""
    if (codec := _NUMERIC_TAGS.get(tag)) is not None:
        return codec
    formats, codecs = _library("avformat"), _library("avcodec")
    for table in (formats.avformat_get_riff_video_tags, formats.avformat_get_mov_video_tags):
        table.restype = ctypes.c_void_p
    tables = (ctypes.c_void_p * 3)(
        formats.avformat_get_riff_video_tags(), formats.avformat_get_mov_video_tags(), None
    )
    codecs.avcodec_get_name.restype = ctypes.c_char_p
    number = formats.av_codec_get_id(tables, ctypes.c_uint(tag))
    name: bytes = codecs.avcodec_get_name(number)
    return name.decode("ascii", "replace") if number else None


@lru_cache(maxsize=256)
def _decoder_of_codec(codec: str) -> str | None:
    """Return the name of FFmpeg's first decoder of a codec; None if it has none."""
    codecs = _library("avcodec")
    codecs.avcodec_descriptor_get_by_name.restype = ctypes.POINTER(ctypes.c_int)
    codecs.avcodec_find_decoder.restype = ctypes.POINTER(_Decoder)
    descriptor = codecs.avcodec_descriptor_get_by_name(codec.encode())
    decoder = (
        codecs.avcodec_find_decoder(descriptor[0]) if descriptor else None
    )  # its first field: the number
    return decoder[0].name.decode() if decoder else None


def _codec_of_video_decoder(name: str) -> str | None:
    """Return the codec of a decoder; None if it does not decode video."""
    codecs = _library("avcodec")
    codecs.avcodec_find_decoder_by_name.restype = ctypes.POINTER(_Decoder)
    codecs.avcodec_get_name.restype = ctypes.c_char_p
    found = codecs.avcodec_find_decoder_by_name(name.encode())
    if found and found[0].type != _VIDEO:
        return None
    codec: bytes = codecs.avcodec_get_name(found[0].id) if found else name.encode()
    return codec.decode()
