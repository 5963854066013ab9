"""`visionedge model eval`: how well a model sees, by COCO's average precision, through the very pipeline."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from visionedge.camera.sources.images import read_picture
from visionedge.config.schema import InferenceConfig
from visionedge.engine.local_engine import Engine, open_engine
from visionedge.engine.one_shot import analyse, frame_of
from visionedge.errors import SourceError
from visionedge.frames.types import Result
from visionedge.model.model import load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.models.coco import (
    Annotations,
    Found,
    Photo,
    average_precision,
    categories_of,
    read_annotations,
    require_pycocotools,
)
from visionedge.runtime.redaction import redact

SCORE_FLOOR = 0.01
"""Average precision is over the whole curve; what is less sure than this changes nothing any more."""


_Outcome = Result | SourceError


@dataclass(frozen=True, slots=True)
class Request:
    """What `visionedge model eval` was asked for. `limit` takes only the first pictures; `auto` is fp32."""

    model: Path
    coco: Path
    images: Path
    inference: InferenceConfig
    data: Path | None = None
    limit: int | None = None


@dataclass(slots=True)
class _Tally:
    """What came of the pictures so far."""

    found: list[Found]
    done: list[int]
    failed: list[str]


def evaluate(request: Request, tell: TextIO | None = None) -> dict[str, Any]:
    """The figures of a model as a document; progress and what could not be read goes to `tell` (stderr).

    Raises:
        ConfigError: the annotations are none, or the model's labels are not among their categories.
        ModelError, DeviceError, UnavailableError: nothing can be computed.
        SourceError: not one of the pictures is there.
    """
    tell = tell or sys.stderr
    require_pycocotools()
    annotations = read_annotations(request.coco)
    model = load_model(request.model)
    categories = categories_of(model.labels, annotations)
    photos = _present(annotations, request, tell)
    selection = Selection.of(model, SCORE_FLOOR, request.inference.iou)
    # What is measured must not depend on what this machine happened to choose before.
    plain = {"precision": "fp32"} if request.inference.precision == "auto" else {}
    inference = request.inference.model_copy(update=plain)
    with closing(
        open_engine(model, inference, data=request.data, measuring=False, level=logging.DEBUG)
    ) as engine:
        began_ns = time.monotonic_ns()
        look = _looking(request.images, engine, selection)
        tally = _all(photos, look, engine.plan.lanes, categories, _Bar(len(photos), tell))
        took_s = (time.monotonic_ns() - began_ns) / 1e9
        device, precision = engine.device.effective, engine.precision.precision
    for words in tally.failed:
        tell.write(f"visionedge: {redact(words)}\n")
    return {
        "model": model.name,
        "sha256": model.sha256,
        "device": device,
        "precision": precision,
        "pictures": len(tally.done),
        "missing": _asked(annotations, request) - len(tally.done),
        "classes": len(model.labels),
        "classesWithCategory": len(categories),
        "detections": len(tally.found),
        "scoreFloor": SCORE_FLOOR,
        "picturesPerSecond": round(len(tally.done) / took_s, 2) if took_s else None,
        **average_precision(annotations, tally.done, tally.found),
    }


def _asked(annotations: Annotations, request: Request) -> int:
    return min(len(annotations.photos), request.limit or len(annotations.photos))


def _present(annotations: Annotations, request: Request, tell: TextIO) -> list[Photo]:
    """The pictures that are there; one line for all that are not.

    Raises:
        SourceError: none is.
    """
    photos = annotations.photos[: request.limit]
    present = [photo for photo in photos if (request.images / photo.file).is_file()]
    missing = [photo.file for photo in photos if not (request.images / photo.file).is_file()]
    if not present:
        raise SourceError(
            f"{request.images}: none of the {len(photos)} pictures is there, such as {missing[0]}"
        )
    if missing:
        tell.write(
            redact(
                f"visionedge: {request.images}: {len(missing)} of {len(photos)} pictures are not there,"
                f" such as {missing[0]}\n"
            )
        )
    return present


def _looking(folder: Path, engine: Engine, selection: Selection) -> Callable[[Photo], _Outcome]:
    def look(photo: Photo) -> _Outcome:
        try:
            picture = read_picture(folder / photo.file)
        except SourceError as error:
            return error
        return analyse([frame_of(picture, engine)], engine, selection)[0]

    return look


def _all(
    photos: Sequence[Photo],
    look: Callable[[Photo], _Outcome],
    lanes: int,
    categories: dict[int, int],
    bar: "_Bar",
) -> _Tally:
    tally = _Tally([], [], [])
    with closing(bar):
        for photo, result in _in_order(photos, look, lanes):
            bar.step()
            if isinstance(result, SourceError):
                tally.failed.append(str(result))
                continue
            tally.done.append(photo.number)
            tally.found += _found(photo, result, categories)
    return tally


def _in_order(
    photos: Sequence[Photo], look: Callable[[Photo], _Outcome], lanes: int
) -> Iterator[tuple[Photo, _Outcome]]:
    """Each picture with what came of it, while the next ones are computed."""
    waiting: deque[tuple[Photo, Future[_Outcome]]] = deque()
    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
        for photo in photos:
            waiting.append((photo, pool.submit(look, photo)))
            if len(waiting) > lanes + 1:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()


def _found(photo: Photo, result: Result, categories: dict[int, int]) -> Iterator[Found]:
    width_px, height_px = result.frame.width_px, result.frame.height_px
    columns = result.detections
    for box, score, class_id in zip(
        columns.boxes.tolist(), columns.scores.tolist(), columns.class_ids.tolist(), strict=True
    ):
        if class_id in categories:
            left, top, right, bottom = box
            place = (
                *(left * width_px, top * height_px),
                *((right - left) * width_px, (bottom - top) * height_px),
            )
            yield Found(photo.number, categories[class_id], place, score)


class _Bar:
    """Progress on a terminal as a line that grows, elsewhere as a line now and then."""

    WIDTH = 30
    LINES = 10

    def __init__(self, total: int, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._out, self._clock = total, out, clock
        self._done = 0
        self._began_s = clock()
        self._live = out.isatty()

    def step(self) -> None:
        """One more is done."""
        before, self._done = self._done, self._done + 1
        if self._live or before * self.LINES // self._total < self._done * self.LINES // self._total:
            self._out.write(self._line())
            self._out.flush()

    def close(self) -> None:
        """Leave the line."""
        if self._live and self._done:
            self._out.write("\n")

    def _line(self) -> str:
        spent_s = max(self._clock() - self._began_s, 1e-9)
        speed = self._done / spent_s
        left_s = (self._total - self._done) / speed
        words = f"{self._done}/{self._total} pictures, {speed:.1f} a second, {left_s:.0f} s left"
        if not self._live:
            return f"{words}\n"
        full = self.WIDTH * self._done // self._total
        return f"\r[{'#' * full}{'.' * (self.WIDTH - full)}] {words}   "


def words(report: dict[str, Any]) -> str:
    """The figures for people, in the order that COCO has them."""
    rows = [
        ("AP", "ap", "IoU 0.50-0.95"),
        ("AP50", "ap50", "IoU 0.50"),
        ("AP75", "ap75", "IoU 0.75"),
        ("AP small", "apSmall", "less than 32 x 32"),
        ("AP medium", "apMedium", "up to 96 x 96"),
        ("AP large", "apLarge", "more"),
        ("AR 100", "ar100", "recall with 100 boxes a picture"),
    ]
    head = (
        f"{report['model']} in {report['precision']} on {report['device']}: {report['pictures']} pictures,"
        f" {report['detections']} detections of {report['scoreFloor']} and more,"
        f" {report['classesWithCategory']} of {report['classes']} classes among the categories\n"
    )
    return head + "".join(
        f"  {name:<10} {'-' if report[key] is None else format(report[key], '.3f'):>6}   {note}\n"
        for name, key, note in rows
    )
