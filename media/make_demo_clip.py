"""Cut the demo clip out of OpenCV's vtest.avi: 25 seconds of a street, small enough for a repository.

The clip stands in for a camera, so it is coded as cameras do: H.264 without B-frames, a key picture every
two seconds. One encoder thread and no version strings in the container keep the bytes the same from run to
run; another build of the encoder may still give other bytes, which is why only the source is pinned here.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
from av.video.frame import PictureType, VideoFrame

SOURCE_SHA256: Final = "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf"
# Six to nine people are in view here, walking at different distances.
FIRST_FRAME: Final = 100
FRAMES: Final = 250
FRAMES_PER_S: Final = 10
KEY_EVERY_S: Final = 2
ENCODER: Final = {
    "profile": "main",
    "preset": "slower",
    "crf": "29",
    "refs": "2",  # what small hardware decoders hold
    "bf": "0",
    "sc_threshold": "0",  # no key pictures out of turn
    "flags": "+bitexact",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Cut the clip, and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _check(options.source)
        write(read(options.source), options.output)
    except (OSError, ValueError) as error:  # PyAV's errors are both
        sys.stderr.write(f"make_demo_clip: {error}\n")
        return 1
    content = options.output.read_bytes()
    sys.stdout.write(
        f"{options.output}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_demo_clip",
        description="Cut the demo clip (H.264, 768x576, 10 frames/s, 25 s) out of OpenCV's vtest.avi.",
        epilog="""\
example:
  apt-get download opencv-doc && dpkg-deb -x opencv-doc_*.deb doc
  python media/make_demo_clip.py doc/usr/share/doc/opencv-doc/examples/data/vtest.avi -o media/demo.mp4

Needs PyAV with an H.264 encoder. The sha256 of the source is checked: exit code 1 means that it is another
file or cannot be read.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="VTEST_AVI", type=Path, help="vtest.avi as OpenCV publishes it")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the MP4 to write")
    return parser


def _check(source: Path) -> None:
    with source.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SOURCE_SHA256:
        raise ValueError(f"{source}: sha256 is {found}, expected {SOURCE_SHA256}")


def read(source: Path) -> Iterator[VideoFrame]:
    """Decode the part of the source that becomes the clip."""
    with av.open(str(source)) as container:
        yield from itertools.islice(container.decode(video=0), FIRST_FRAME, FIRST_FRAME + FRAMES)


def write(frames: Iterator[VideoFrame], output: Path) -> None:
    """Encode the frames into an MP4 that can be played while it is still being fetched."""
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(output), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_S, options=ENCODER)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = KEY_EVERY_S * FRAMES_PER_S
        stream.codec_context.thread_count = 1
        for index, frame in enumerate(frames):
            if index == 0:
                stream.width, stream.height = frame.width, frame.height
            picture = frame.reformat(format="yuv420p")
            picture.pict_type = PictureType.NONE  # else the encoder repeats the source's key pictures
            picture.pts, picture.time_base = index, Fraction(1, FRAMES_PER_S)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    sys.exit(main())
