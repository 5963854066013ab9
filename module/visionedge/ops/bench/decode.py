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

from visionedge.camera.sources.base import DecoderLibrary, FrameSource, SourceLimits
from visionedge.camera.sources.open import DEMO_CLIP, open_source
from visionedge.camera.sources.opencv import open_video as open_with_opencv
from visionedge.camera.sources.opencv_setup import configure_opencv
from visionedge.camera.timing import FrameSampler
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError, UnavailableError
from visionedge.frames.types import InputSpec, Picture
from visionedge.ops.bench.report import describe_machine
from visionedge.runtime.installation import build_install_command, find_bundled_file

BenchReport = dict[str, Any]
DecodePlayback = Iterator[int]
"""Plays the clip to its end; after each step the number of pictures of the clip that it has covered."""

_COMPARED_FRAMES = 6
_WARM_UP_SHARE = 1 / 3
"""So much of the clip is played before the measuring begins: what to leave out is learnt from the stream."""

_TURN_FRAMES = 30
"""Pictures of the clip that a way covers before it is another one's turn."""

_TINY_INPUT = InputSpec(32, 32)
_DEMO_REPEATS = 3


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


def bench_decode(load: DecodeLoad, progress: Callable[[str], None]) -> BenchReport:
    """Measure, and give the report as a document. `tell` hears of the progress.

    Raises:
        SourceError: the source cannot be read.
        UnavailableError: PyAV is not installed.
    """
    try:
        import av  # noqa: F401 - only whether it is there
    except ImportError:
        raise UnavailableError(
            f"bench decode needs PyAV; install it with: {build_install_command('av')}"
        ) from None
    configure_opencv()
    with _clip(load, progress) as clip:
        taken_ms: dict[str, list[float]] = {}
        for number in range(load.rounds):
            for name, ms in _cpu_ms(_open_playbacks(clip, load), _count(clip)).items():
                taken_ms.setdefault(name, []).append(ms)
            progress(
                f"round {number + 1}/{load.rounds}: " + _figures({n: t[-1] for n, t in taken_ms.items()})
            )
        return _report(load, clip, taken_ms, _errors(clip, load.spec))


# --- the ways -----------------------------------------------------------------------------------------------


def _open_playbacks(clip: Path, load: DecodeLoad) -> dict[str, DecodePlayback]:
    spec = load.spec
    return {
        "bare": _play_with_pyav(clip),
        "grab": _play_with_opencv(clip, None),
        "ours": _play_with_source(clip, "pyav", spec),
        "plain": _play_with_opencv(clip, spec),
        "oursOpencv": _play_with_source(clip, "opencv", spec),
        # A tiny picture, as only the decoding is asked about, and some is done when a picture is looked at.
        "fps": _play_with_source(clip, "pyav", _TINY_INPUT, load.fps),
        "keyFps": _play_with_source(clip, "pyav", _TINY_INPUT, load.key_fps),
    }


def _play_with_pyav(clip: Path) -> DecodePlayback:
    """PyAV and one thread; nothing is done with the pictures."""
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield from (number for number, _ in enumerate(container.decode(stream), 1))


def _play_with_opencv(clip: Path, spec: InputSpec | None) -> DecodePlayback:
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


def _play_with_source(
    clip: Path, library: DecoderLibrary, spec: InputSpec, fps: float | None = None
) -> DecodePlayback:
    """A camera's own source, filling one slot again and again with the pictures that are due."""
    slot: Picture = np.empty((spec.height_px, spec.width_px, 3), np.uint8)
    due, covered = FrameSampler(fps), 0
    with closing(_open(clip, library, fps)) as source:
        while (decoded := source.read()) is not None:
            if due.is_due(decoded.position_s or 0.0):
                decoded.fit_to_input(spec, slot)
            covered += decoded.source_frames
            yield covered


def _open(clip: Path, library: DecoderLibrary, fps: float | None) -> FrameSource:
    limits = SourceLimits(pictures_per_s=fps, library=library)
    if library == "opencv":
        return open_with_opencv(clip, limits)
    return open_source(parse_camera_uri(str(clip)), limits)


class _TimedPlayback:
    """A way, how much of the clip it has covered, and what the part that counts has cost."""

    def __init__(self, playback: DecodePlayback) -> None:
        self._way = playback
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


def _cpu_ms(playbacks: Mapping[str, DecodePlayback], pictures: int) -> dict[str, float]:
    """CPU per picture of the clip, from where the ways have settled."""
    played = {name: _TimedPlayback(playback) for name, playback in playbacks.items()}
    for until in range(_TURN_FRAMES, pictures + _TURN_FRAMES, _TURN_FRAMES):
        for each in played.values():
            each.play(until, counts=until > pictures * _WARM_UP_SHARE)
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

    every = max(1, _count(clip) // _COMPARED_FRAMES)
    errors = []
    with av.open(str(clip)) as container, closing(_open(clip, "pyav", None)) as source:
        for number, frame in enumerate(container.decode(video=0)):
            decoded = source.read()
            if number % every == 0 and decoded is not None:
                image, place = decoded.fit_to_input(spec)
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
def _clip(load: DecodeLoad, progress: Callable[[str], None]) -> Iterator[Path]:
    if load.source is not None:
        with closing(open_source(parse_camera_uri(str(load.source)))):
            yield load.source
        return
    with TemporaryDirectory(prefix="visionedge-bench-") as folder:
        progress("making a clip: 1080p H.264 with B-pictures, 30 per second, a key picture every 2 s")
        yield _encode_clip(Path(folder) / "clip.mp4")


def _encode_clip(path: Path) -> Path:
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

    for _ in range(_DEMO_REPEATS):
        with av.open(str(find_bundled_file(DEMO_CLIP))) as source:
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


def _report(
    load: DecodeLoad, clip: Path, taken_ms: dict[str, list[float]], errors: list[float]
) -> BenchReport:
    above_ms = {name: _subtract(taken_ms[name], taken_ms["bare"]) for name in ("ours", "plain")}
    return {
        "schema": "visionedge/bench-decode/1",
        "machine": describe_machine(),
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


def _subtract(some_ms: list[float], others_ms: list[float]) -> list[float]:
    return [one - other for one, other in zip(some_ms, others_ms, strict=True)]


def _ratio(some_ms: list[float], others_ms: list[float]) -> float:
    """The median of the rounds' ratios; a clock of coarse steps may give 0 for a short clip."""
    pairs = zip(some_ms, others_ms, strict=True)
    return round(median(one / (other or 1e-6) for one, other in pairs), 3)


def format_report(report: BenchReport) -> str:
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
