"""`visionedge bench decode`: what it costs to bring pictures to the model's size, and how right they are.

Everything plays the same clip, in rounds and in each of them by turns, a second of the clip at a time, as how
fast a machine is changes within seconds. All is told as medians over the rounds: CPU time per picture of the
clip, and ratios of each round. Bare decoding is taken off both sides, so that two ways from packet to slot
can be compared however dear that is.
"""

import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np

from visionedge.camera.sources.base import Library, Limits, Source
from visionedge.camera.sources.open import DEMO_CLIP, open_source
from visionedge.camera.sources.opencv import open_video as open_with_opencv
from visionedge.camera.sources.opencv_setup import settle_libraries
from visionedge.camera.timing import Due
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError, UnavailableError
from visionedge.frames.types import InputSpec, Picture
from visionedge.ops.bench.report import machine
from visionedge.runtime.installation import bundled, install_command

Report = dict[str, Any]
Way = Iterator[int]
"""Plays the clip to its end; after each step the number of pictures of the clip that it has covered."""

_COMPARED = 6
_SETTLING = 1 / 3
"""So much of the clip is played before the measuring begins: what to leave out is learnt from the stream."""

_STRETCH = 30
"""Pictures of the clip that a way covers before it is another one's turn."""

_TINY = InputSpec(32, 32)
_ROUNDS_OF_THE_DEMO = 3


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """`source` None is a clip made for it: 1080p, B-pictures, 30 per second, a key picture every 2 s.

    `spec` is the model's input, by default that of the bundled one. `fps` and `key_fps` are rates to ask of
    the clip: one for which pictures that others refer to should do, one for which key pictures should.
    """

    source: Path | None = None
    spec: InputSpec = field(default_factory=lambda: InputSpec(416, 416))
    fps: float = 5.0
    key_fps: float = 0.5
    rounds: int = 5


def bench_decode(load: DecodeLoad, tell: Callable[[str], None]) -> Report:
    """Measure, and give the report as a document. `tell` hears of the progress.

    Raises:
        SourceError: the source cannot be read.
        UnavailableError: PyAV is not installed.
    """
    try:
        import av  # noqa: F401 - only whether it is there
    except ImportError:
        raise UnavailableError(f"bench decode needs PyAV; install it with: {install_command('av')}") from None
    settle_libraries()
    with _clip(load, tell) as clip:
        taken_ms: dict[str, list[float]] = {}
        for number in range(load.rounds):
            for name, ms in _cpu_ms(_ways(clip, load), _count(clip)).items():
                taken_ms.setdefault(name, []).append(ms)
            tell(f"round {number + 1}/{load.rounds}: " + _figures({n: t[-1] for n, t in taken_ms.items()}))
        return _report(load, clip, taken_ms, _errors(clip, load.spec))


# --- the ways -----------------------------------------------------------------------------------------------


def _ways(clip: Path, load: DecodeLoad) -> dict[str, Way]:
    spec = load.spec
    return {
        "bare": _bare(clip),
        "grab": _plain(clip, None),
        "ours": _ours(clip, "pyav", spec),
        "plain": _plain(clip, spec),
        "oursOpencv": _ours(clip, "opencv", spec),
        # A tiny picture, as only the decoding is asked about, and some is done when a picture is looked at.
        "fps": _ours(clip, "pyav", _TINY, load.fps),
        "keyFps": _ours(clip, "pyav", _TINY, load.key_fps),
    }


def _bare(clip: Path) -> Way:
    """PyAV and one thread; nothing is done with the pictures."""
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield from (number for number, _ in enumerate(container.decode(stream), 1))


def _plain(clip: Path, spec: InputSpec | None) -> Way:
    """OpenCV's `read` and a letterbox as people write it; without `spec` only `grab`."""
    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    number = 0
    while capture.grab() if spec is None else _letterboxed(capture, spec):
        number += 1
        yield number
    capture.release()


def _letterboxed(capture: cv2.VideoCapture, spec: InputSpec) -> bool:
    good, picture = capture.read()
    if good:
        place = spec.place(picture.shape[1], picture.shape[0])
        small = cv2.resize(picture, (int(place.width_px), int(place.height_px)))
        top, left = int(place.top_px), int(place.left_px)
        bottom, right = spec.height_px - top - small.shape[0], spec.width_px - left - small.shape[1]
        cv2.copyMakeBorder(small, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    return good


def _ours(clip: Path, library: Library, spec: InputSpec, fps: float | None = None) -> Way:
    """A camera's own source, filling one slot again and again with the pictures that are due."""
    slot: Picture = np.empty((spec.height_px, spec.width_px, 3), np.uint8)
    due, covered = Due(fps), 0
    with closing(_open(clip, library, fps)) as source:
        while (decoded := source.read()) is not None:
            if due.take(decoded.position_s or 0.0):
                decoded.fill(spec, slot)
            covered += decoded.covers
            yield covered


def _open(clip: Path, library: Library, fps: float | None) -> Source:
    limits = Limits(pictures_per_s=fps, library=library)
    if library == "opencv":
        return open_with_opencv(clip, limits)
    return open_source(parse_camera_uri(str(clip)), limits)


class _Played:
    """A way, how much of the clip it has covered, and what the part that counts has cost."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._covered = 0
        self._counted = 0
        self._cpu_s = 0.0

    def play(self, until: int, *, counts: bool) -> None:
        """Go on until so many pictures are covered, or to the end."""
        before, began_s = self._covered, _cpu_s()
        while self._covered < until and (covered := next(self._way, None)) is not None:
            self._covered = covered
        if counts:
            self._counted += self._covered - before
            self._cpu_s += _cpu_s() - began_s

    @property
    def ms(self) -> float:
        """CPU per picture of the clip."""
        return self._cpu_s * 1000 / max(1, self._counted)


def _cpu_ms(ways: Mapping[str, Way], pictures: int) -> dict[str, float]:
    """CPU per picture of the clip, from where the ways have settled."""
    played = {name: _Played(way) for name, way in ways.items()}
    for until in range(_STRETCH, pictures + _STRETCH, _STRETCH):
        for each in played.values():
            each.play(until, counts=until > pictures * _SETTLING)
    return {name: each.ms for name, each in played.items()}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- how right ----------------------------------------------------------------------------------------------


def _errors(clip: Path, spec: InputSpec) -> list[float]:
    """Mean difference in grey levels from a slow reference, of some pictures of the clip.

    The reference is the whole picture, coloured by FFmpeg and then resized in float64.
    """
    import av

    every = max(1, _count(clip) // _COMPARED)
    errors = []
    with av.open(str(clip)) as container, closing(_open(clip, "pyav", None)) as source:
        for number, frame in enumerate(container.decode(video=0)):
            decoded = source.read()
            if number % every == 0 and decoded is not None:
                image, place = decoded.fill(spec)
                left, top = int(place.left_px), int(place.top_px)
                width, height = int(place.width_px), int(place.height_px)
                expected = _resized(frame.to_ndarray(format="bgr24"), width, height)
                difference = image[top : top + height, left : left + width] - expected
                errors.append(float(np.abs(difference).mean()))
    return errors


def _resized(picture: Any, width: int, height: int) -> Any:
    """Bilinear, centre on centre, in float64."""
    rows, row_parts = _between(picture.shape[0], height)
    columns, column_parts = _between(picture.shape[1], width)
    upper, lower = picture[rows].astype(np.float64), picture[rows + 1].astype(np.float64)
    lines = upper + (lower - upper) * row_parts[:, None, None]
    return lines[:, columns] + (lines[:, columns + 1] - lines[:, columns]) * column_parts[None, :, None]


def _between(old: int, new: int) -> tuple[Any, Any]:
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    first = np.minimum(at.astype(int), old - 2)
    return first, at - first


# --- the clip -----------------------------------------------------------------------------------------------


@contextmanager
def _clip(load: DecodeLoad, tell: Callable[[str], None]) -> Iterator[Path]:
    if load.source is not None:
        with closing(open_source(parse_camera_uri(str(load.source)))):
            yield load.source
        return
    with TemporaryDirectory(prefix="visionedge-bench-") as folder:
        tell("making a clip: 1080p H.264 with B-pictures, 30 per second, a key picture every 2 s")
        yield _made(Path(folder) / "clip.mp4")


def _made(path: Path) -> Path:
    """The bundled clip three times, enlarged, as x264 codes it by itself."""
    import av

    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=30, options={"preset": "fast", "g": "60", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for number, large in enumerate(_enlarged()):
            large.pts, large.time_base = number, Fraction(1, 30)
            target.mux(stream.encode(large))
        target.mux(stream.encode(None))
    return path


def _enlarged() -> Iterator[Any]:
    import av
    from av.video.frame import PictureType

    for _ in range(_ROUNDS_OF_THE_DEMO):
        with av.open(str(bundled(DEMO_CLIP))) as source:
            for frame in source.decode(video=0):
                large = frame.reformat(1920, 1080, "yuv420p")
                # Else the encoder would take the picture types over, and code no B-pictures.
                large.pict_type = PictureType.NONE
                yield large


def _count(clip: Path) -> int:
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if count == 0:
        raise SourceError(f"{clip} holds no pictures")
    return count


# --- figures ------------------------------------------------------------------------------------------------


def _report(load: DecodeLoad, clip: Path, taken_ms: dict[str, list[float]], errors: list[float]) -> Report:
    above_ms = {name: _less(taken_ms[name], taken_ms["bare"]) for name in ("ours", "plain")}
    return {
        "schema": "visionedge/bench-decode/1",
        "machine": machine(),
        "load": {
            "source": None if load.source is None else str(load.source),
            "pictures": _count(clip),
            "inputWidth": load.spec.width_px,
            "inputHeight": load.spec.height_px,
            "fps": load.fps,
            "keyFps": load.key_fps,
            "rounds": load.rounds,
        },
        "cpuMsPerPicture": {name: round(median(ms), 3) for name, ms in taken_ms.items()},
        "aboveDecodingMs": {name: round(median(ms), 3) for name, ms in above_ms.items()},
        "ratio": {
            "aboveDecoding": _ratio(above_ms["ours"], above_ms["plain"]),
            "fps": _ratio(taken_ms["fps"], taken_ms["bare"]),
            "keyFps": _ratio(taken_ms["keyFps"], taken_ms["bare"]),
        },
        "meanErrorGreyLevels": {"median": round(median(errors), 3), "most": round(max(errors), 3)},
    }


def _less(some_ms: list[float], others_ms: list[float]) -> list[float]:
    return [one - other for one, other in zip(some_ms, others_ms, strict=True)]


def _ratio(some_ms: list[float], others_ms: list[float]) -> float:
    """The median of the rounds' ratios; a clock of coarse steps may give 0 for a short clip."""
    pairs = zip(some_ms, others_ms, strict=True)
    return round(median(one / (other or 1e-6) for one, other in pairs), 3)


def words(report: Report) -> str:
    """The report for people."""
    load, cost, ratio = report["load"], report["cpuMsPerPicture"], report["ratio"]
    above, error = report["aboveDecodingMs"], report["meanErrorGreyLevels"]
    lines = [
        f"{load['source'] or '1080p, made for this'}: {load['pictures']} pictures "
        f"to {load['inputWidth']} x {load['inputHeight']}, CPU ms per picture of the clip",
        f"decoding alone           {cost['bare']:7.2f}   (OpenCV's grab {cost['grab']:.2f})",
        f"to a filled slot         {cost['ours']:7.2f}   above decoding {above['ours']:.2f}",
        f"OpenCV read + letterbox  {cost['plain']:7.2f}   above decoding {above['plain']:.2f}; "
        f"ratio {ratio['aboveDecoding']:.2f}",
        f"with OpenCV as decoder   {cost['oursOpencv']:7.2f}",
        f"{load['fps']:<5g} a second, decoded {cost['fps']:7.2f}   {ratio['fps']:.2f} of decoding alone",
        f"{load['keyFps']:<5g} a second, decoded {cost['keyFps']:7.2f}   {ratio['keyFps']:.2f} of that",
        f"mean error against a slow reference {error['median']:.2f} grey levels, at most {error['most']:.2f}",
    ]
    return "\n  ".join(lines) + "\n"


def _figures(cost: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.2f}" for name, ms in cost.items())
