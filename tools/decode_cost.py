"""The processor time of decoding a picture and bringing it to the model's size, and the error of the result.

    python tools/decode_cost.py --source yard-1080p.mp4 --json decode.json

All playbacks decode the same clip on one thread, in rounds, and take turns of 30 pictures, because the speed
of a machine varies within seconds. The results are medians over the rounds: CPU ms per picture of the clip,
and ratios of each round. The cost of bare decoding is subtracted from both sides of `aboveDecoding`.
"""

import argparse
import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import av
import cv2
import numpy as np
from av.video.frame import PictureType

from visionedge.camera.sources.base import DecoderLibrary, FrameSource, SourceLimits
from visionedge.camera.sources.open import DEMO_CLIP, open_source
from visionedge.camera.sources.opencv import open_video as open_with_opencv
from visionedge.camera.sources.opencv_setup import configure_opencv
from visionedge.camera.timing import FrameSampler
from visionedge.config.addresses import parse_camera_uri
from visionedge.errors import SourceError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import InputSpec, Picture
from visionedge.ops.bench.machine import describe_machine
from visionedge.runtime.installation import find_bundled_file
from visionedge.runtime.measurement import median_ratio, run_in_rounds

Playback = Iterator[int]
"""Plays the clip to its end; each step yields the number of pictures of the clip that are covered so far."""

_COMPARED_FRAMES = 6
_WARM_UP_SHARE = 1 / 3  # a source learns from the stream which pictures it may skip
_TURN_FRAMES = 30
_TINY_INPUT = InputSpec(32, 32)
_DEMO_REPEATS = 3


def measure(clip: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of one clip."""
    configure_opencv()
    spec, pictures = InputSpec(arguments.size, arguments.size), _count(clip)

    def one_round() -> dict[str, float]:
        return _cpu_ms(_open_playbacks(clip, spec, arguments.fps, arguments.key_fps), pictures)

    def progress(number: int, results: Mapping[str, Sequence[dict[str, float]]]) -> None:
        figures = ", ".join(f"{name} {ms:.2f}" for name, ms in results[""][-1].items())
        print(f"round {number}/{arguments.rounds}: {figures}", file=sys.stderr)

    rounds = run_in_rounds({"": one_round}, arguments.rounds, progress)[""]
    bare = [each["bare"] or 1e-6 for each in rounds]  # a coarse clock may give 0 for a short clip
    above = [{name: each[name] - each["bare"] for name in ("ours", "plain")} for each in rounds]
    errors = _errors(clip, spec)
    return {
        "schema": "visionedge/bench-decode/1",
        "machine": describe_machine(),
        "load": {
            "source": arguments.source,
            "pictures": pictures,
            "inputWidth": spec.width_px,
            "inputHeight": spec.height_px,
            "fps": arguments.fps,
            "keyFps": arguments.key_fps,
            "rounds": arguments.rounds,
        },
        "cpuMsPerPicture": {name: round(median(each[name] for each in rounds), 3) for name in rounds[0]},
        "aboveDecodingMs": {name: round(median(each[name] for each in above), 3) for name in above[0]},
        "ratio": {
            "aboveDecoding": round(median(each["ours"] / (each["plain"] or 1e-6) for each in above), 3),
            "fps": round(median_ratio([each["fps"] for each in rounds], bare, float), 3),
            "keyFps": round(median_ratio([each["keyFps"] for each in rounds], bare, float), 3),
        },
        "meanErrorGreyLevels": {"median": round(median(errors), 3), "most": round(max(errors), 3)},
    }


# --- the playbacks ------------------------------------------------------------------------------------------


def _open_playbacks(clip: Path, spec: InputSpec, fps: float, key_fps: float) -> dict[str, Playback]:
    return {
        "bare": _play_with_pyav(clip),
        "grab": _play_with_opencv(clip, None),
        "ours": _play_with_source(clip, "pyav", spec),
        "plain": _play_with_opencv(clip, spec),
        "oursOpencv": _play_with_source(clip, "opencv", spec),
        # A tiny input, because these two measure decoding, and part of the decoding is done on access.
        "fps": _play_with_source(clip, "pyav", _TINY_INPUT, fps),
        "keyFps": _play_with_source(clip, "pyav", _TINY_INPUT, key_fps),
    }


def _play_with_pyav(clip: Path) -> Playback:
    """Bare decoding with PyAV on one thread."""
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield from (number for number, _ in enumerate(container.decode(stream), 1))


def _play_with_opencv(clip: Path, spec: InputSpec | None) -> Playback:
    """OpenCV's `read` and a letterbox; without `spec` only `grab`."""
    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    number = 0
    while capture.grab():
        if spec is not None:
            fit_to_input(np.asarray(capture.retrieve()[1], np.uint8), spec)
        number += 1
        yield number
    capture.release()


def _play_with_source(
    clip: Path, library: DecoderLibrary, spec: InputSpec, fps: float | None = None
) -> Playback:
    """A camera's own source: the pictures that are due, at the model's size, in one buffer."""
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


def _cpu_ms(playbacks: Mapping[str, Playback], pictures: int) -> dict[str, float]:
    """CPU ms per picture of the clip; the first third of the clip warms up."""
    covered = dict.fromkeys(playbacks, 0)
    counted = dict.fromkeys(playbacks, 0)
    used_s = dict.fromkeys(playbacks, 0.0)
    for until in range(_TURN_FRAMES, pictures + _TURN_FRAMES, _TURN_FRAMES):
        for name, playback in playbacks.items():
            before, began_s = covered[name], _cpu_s()
            while covered[name] < until and (number := next(playback, None)) is not None:
                covered[name] = number
            if until > pictures * _WARM_UP_SHARE:
                counted[name] += covered[name] - before
                used_s[name] += _cpu_s() - began_s
    return {name: used_s[name] * 1000 / max(1, counted[name]) for name in playbacks}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- the error ----------------------------------------------------------------------------------------------


def _errors(clip: Path, spec: InputSpec) -> list[float]:
    """The mean difference in grey levels of some pictures to a slow reference.

    The reference is the whole picture, converted to BGR by FFmpeg and then resized in float64.
    """
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
def _clip(source: str | None) -> Iterator[Path]:
    if source is not None:
        with closing(open_source(parse_camera_uri(source))):
            yield Path(source)
        return
    with TemporaryDirectory(prefix="visionedge-decode-") as folder:
        yield _encode_clip(Path(folder) / "clip.mp4")


def _encode_clip(path: Path) -> Path:
    """The bundled clip three times, enlarged to 1080p, with B-pictures and a key picture every 2 s."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=30, options={"preset": "fast", "g": "60", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for number, large in enumerate(_enlarged()):
            large.pts, large.time_base = number, Fraction(1, 30)
            target.mux(stream.encode(large))
        target.mux(stream.encode(None))
    return path


def _enlarged() -> Iterator[Any]:
    for _ in range(_DEMO_REPEATS):
        with av.open(str(find_bundled_file(DEMO_CLIP))) as source:
            for frame in source.decode(video=0):
                large = frame.reformat(1920, 1080, "yuv420p")
                # Else the encoder would keep the picture types of the source, which has no B-pictures.
                large.pict_type = PictureType.NONE
                yield large


def _count(clip: Path) -> int:
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if count == 0:
        raise SourceError(f"{clip} has no pictures")
    return count


# --- the command --------------------------------------------------------------------------------------------


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    load, cost, ratio = report["load"], report["cpuMsPerPicture"], report["ratio"]
    above, error = report["aboveDecodingMs"], report["meanErrorGreyLevels"]
    lines = [
        f"{load['source'] or 'generated 1080p clip'}: {load['pictures']} pictures "
        f"to {load['inputWidth']} x {load['inputHeight']}, CPU ms per picture of the clip",
        f"bare decoding            {cost['bare']:7.2f}   (OpenCV's grab {cost['grab']:.2f})",
        f"to the model's input     {cost['ours']:7.2f}   above decoding {above['ours']:.2f}",
        f"OpenCV read + letterbox  {cost['plain']:7.2f}   above decoding {above['plain']:.2f}; "
        f"ratio {ratio['aboveDecoding']:.2f}",
        f"with OpenCV as decoder   {cost['oursOpencv']:7.2f}",
        f"{load['fps']:<5g} frames/s, decoding {cost['fps']:8.2f}   {ratio['fps']:.2f} of bare decoding",
        f"{load['keyFps']:<5g} frames/s, decoding {cost['keyFps']:8.2f}   {ratio['keyFps']:.2f} of that",
        f"mean error {error['median']:.2f} grey levels, at most {error['most']:.2f}",
    ]
    return "\n  ".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if the clip cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", metavar="FILE", help="a video (default: a generated one, 1920x1080)")
    parser.add_argument(
        "--size", type=int, default=416, help="input width and height, px (default: %(default)s)"
    )
    parser.add_argument("--fps", type=float, default=5.0, help="frames/s of a camera (default: %(default)s)")
    parser.add_argument(
        "--key-fps", type=float, default=0.5, help="frames/s for which key pictures do (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    given = parser.parse_args(arguments)
    try:
        with _clip(given.source) as clip:
            report = measure(clip, given)
    except SourceError as error:
        print(f"decode_cost: {error}", file=sys.stderr)
        return 1
    if given.json:
        Path(given.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(format_report(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
