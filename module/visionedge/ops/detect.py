"""`visionedge detect`: runs pictures, folders and videos through the engine, and writes the results in order.

`run_detect` writes a line of text or a JSON frame object per picture, and annotated pictures into a folder.
"""

import logging
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from visionedge.config.schema import InferenceConfig
from visionedge.engine.local_engine import open_engine
from visionedge.errors import SourceError
from visionedge.frames.drawing import draw_detections
from visionedge.frames.types import FrameResult, Picture, build_frame_document
from visionedge.model.model import find_bundled_model, load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.clips import (
    AnnotatedOutput,
    ClipPicture,
    ClipReader,
    VideoProgress,
    analyse,
    json_line,
    printable,
)


@dataclass(frozen=True, slots=True)
class DetectRequest:
    """The arguments of `visionedge detect`. `model` None is the bundled one.

    Of a video, the first of every `video_stride` pictures is used. `data` is the folder of compiled models;
    None stores nothing.
    """

    paths: tuple[str, ...]
    model: Path | None
    inference: InferenceConfig
    as_json: bool = False
    annotate: Path | None = None
    video_stride: int = 1
    data: Path | None = None


def run_detect(request: DetectRequest, out: TextIO | None = None) -> int:
    """Write a frame object (or text) per picture to `out`; returns 1 if a picture could not be read, else 0.

    Raises:
        ModelError, DeviceError: the model cannot run.
        SourceError: the folder for annotated pictures cannot be written.
    """
    reader = ClipReader(request.paths, video_stride=request.video_stride)
    if not reader.inputs:  # there is nothing to do, and opening a model takes seconds
        return 1
    model = load_model(request.model or find_bundled_model())
    wanted = request.inference
    selection = Selection.of(model, wanted.confidence, wanted.iou, wanted.classes)
    out = out or sys.stdout
    with ExitStack() as stack:
        progress = stack.enter_context(closing(VideoProgress(sys.stderr, owns_terminal=not out.isatty())))
        annotated = None
        if request.annotate is not None:
            annotated = stack.enter_context(AnnotatedOutput(request.annotate, reader.inputs))
        # Measuring the best plan takes longer than a few pictures.
        opened = open_engine(
            model, request.inference, data=request.data, measuring=False, level=logging.DEBUG
        )
        engine = stack.enter_context(closing(opened))
        results = stack.enter_context(closing(analyse(reader.read(engine), engine, selection)))
        for picture, result in results:
            if isinstance(result, SourceError):
                reader.report(result)
                continue
            progress.note(
                picture.source,
                picture.number,
                video=picture.position_s is not None,
                expected=picture.expected,
            )
            _write(picture, result, request.as_json, out)
            if annotated is not None:
                annotated.add(picture, _name_output(picture), partial(_draw, result))
    return 1 if reader.failed else 0


def _name_output(picture: ClipPicture) -> str:
    source = Path(picture.source)
    return source.name if picture.position_s is None else f"{source.stem}.mp4"


def _draw(result: FrameResult) -> Picture:
    return draw_detections(result.frame.full_picture(), result)


def _format_box_px(box: dict[str, float], width_px: int, height_px: int) -> str:
    """A box of a frame object (relative to the picture) in pixels."""
    left, width = round(box["left"] * width_px), round(box["width"] * width_px)
    top, height = round(box["top"] * height_px), round(box["height"] * height_px)
    return f"left {left}, top {top}, {width}x{height} px"


def _write(item: ClipPicture, result: FrameResult, as_json: bool, out: TextIO) -> None:
    document = build_frame_document(result, source=item.source)
    if as_json:
        out.write(json_line(document, out) + "\n")
        return
    where = item.source
    if item.position_s is not None:
        where += f"#{item.number} at {item.position_s:.2f} s"
    took = f"{document['timing']['inferMs']:.1f} ms on {result.device}"
    out.write(f"{printable(where, out)}: {result.frame.width_px}x{result.frame.height_px}, {took}\n")
    for row in document["detections"]:
        place = _format_box_px(row["box"], result.frame.width_px, result.frame.height_px)
        out.write(f"  {printable(row['label'], out):<16} {row['confidence']:.2f}  {place}\n")
    if not document["detections"]:
        out.write("  no detections\n")
