"""`visionedge model eval`: how well a model sees, by COCO's average precision, through the very pipeline."""

import contextlib
import io
import json
import logging
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from visionedge.camera.sources.images import read_picture
from visionedge.config.schema import InferenceConfig
from visionedge.engine.lanes import infer_frames, make_frame
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.errors import ConfigError, SourceError, UnavailableError
from visionedge.frames.types import FrameResult
from visionedge.model.model import load_model
from visionedge.model.postprocess import Selection
from visionedge.runtime.installation import build_install_command
from visionedge.runtime.redaction import redact

# Annotations as COCO writes them, a model's labels among their categories, and average precision.


# The words of older data sets and of Darknet for COCO's own.
_LABEL_SYNONYMS = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_FIGURES = {
    "ap": 0,
    "ap50": 1,
    "ap75": 2,
    "apSmall": 3,
    "apMedium": 4,
    "apLarge": 5,
    "ar1": 6,
    "ar10": 7,
    "ar100": 8,
}


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """A picture of the annotations: its number there and the name of its file."""

    number: int
    file: str


@dataclass(frozen=True, slots=True)
class Annotations:
    """Pictures with boxes that people drew; `categories` are the names by their numbers."""

    document: Mapping[str, Any]
    photos: tuple[AnnotatedImage, ...]
    categories: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class CocoDetection:
    """One detection, in pixels of its picture: left, top, width, height."""

    photo: int
    category: int
    box: tuple[float, float, float, float]
    score: float


def read_annotations(path: Path) -> Annotations:
    """Read a file such as ``instances_val2017.json``.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"--coco {path}: cannot be read: {error.strerror}"]) from None
    except (ValueError, RecursionError):
        raise ConfigError([f"--coco {path}: is no JSON file"]) from None
    try:
        photos = tuple(
            AnnotatedImage(int(image["id"]), str(image["file_name"])) for image in document["images"]
        )
        categories = {int(entry["id"]): str(entry["name"]) for entry in document["categories"]}
        boxes = [_box(entry, number) for number, entry in enumerate(document["annotations"], start=1)]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            [f"--coco {path}: is no file of COCO's kind, with images, categories and annotations with boxes"]
        ) from None
    if not photos or not categories:
        raise ConfigError([f"--coco {path}: has no pictures, or no categories"])
    whole = {"info": {}, "images": document["images"], "categories": document["categories"]}
    return Annotations(whole | {"annotations": boxes}, photos, categories)


def _box(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """An annotation as pycocotools wants it, without its outline."""
    left, top, width, height = (float(value) for value in entry["bbox"])
    return {
        "id": number,
        "image_id": int(entry["image_id"]),
        "category_id": int(entry["category_id"]),
        "bbox": [left, top, width, height],
        "area": float(entry.get("area", width * height)),
        "iscrowd": int(entry.get("iscrowd", 0)),
        "ignore": int(entry.get("ignore", 0)),
    }


def match_categories(labels: Sequence[str], annotations: Annotations) -> dict[int, int]:
    """The category of each class of a model that has one: by name, or by order where it has no names.

    Raises:
        ConfigError: no label is the name of a category.
    """
    numbers = {_normalize_label(name): number for number, name in annotations.categories.items()}
    matched = {
        index: numbers[key] for index, name in enumerate(labels) if (key := _normalize_label(name)) in numbers
    }
    if matched:
        return matched
    nameless = all(re.fullmatch(r"class-\d+", label) for label in labels)
    if nameless and len(labels) == len(annotations.categories):
        return dict(enumerate(sorted(annotations.categories)))
    raise ConfigError(
        [
            f"none of the model's {len(labels)} labels ({_some(labels)}) is among the"
            f" {len(annotations.categories)} categories ({_some(list(annotations.categories.values()))});"
            " put the right ones into MODEL.labels.txt beside the model"
        ]
    )


def _normalize_label(name: str) -> str:
    plain = re.sub(r"[\s_-]+", " ", name.strip().lower())
    return _LABEL_SYNONYMS.get(plain, plain)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")


def require_pycocotools() -> None:
    """Find out at once, not after minutes of computing.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import pycocotools.cocoeval  # noqa: F401 - only whether it is there
    except ImportError:
        raise UnavailableError(
            "pycocotools, which computes average precision, is not installed; install it with: "
            f"{build_install_command('eval')}"
        ) from None


def compute_average_precision(
    annotations: Annotations, photos: Sequence[int], found: Sequence[CocoDetection]
) -> dict[str, float | None]:
    """COCO's figures over some of the pictures; None where there is nothing to measure by."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, seen = COCO(), COCO()
    truth.dataset = dict(annotations.document)
    seen.dataset = {**annotations.document, "annotations": [_entry(f, i) for i, f in enumerate(found, 1)]}
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress to nobody in particular
        truth.createIndex()
        seen.createIndex()
        judge = COCOeval(truth, seen, "bbox")
        judge.params.imgIds = sorted(photos)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    figures = [float(value) for value in judge.stats]
    return {name: figures[index] if figures[index] >= 0 else None for name, index in _FIGURES.items()}


def _entry(found: CocoDetection, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": found.photo,
        "category_id": found.category,
        "bbox": list(found.box),
        "area": found.box[2] * found.box[3],
        "score": found.score,
        "iscrowd": 0,
    }


SCORE_FLOOR = 0.01
"""Average precision is over the whole curve; what is less sure than this changes nothing any more."""


_Outcome = FrameResult | SourceError


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What `visionedge model eval` was asked for. `limit` takes only the first pictures; `auto` is fp32."""

    model: Path
    coco: Path
    images: Path
    inference: InferenceConfig
    data: Path | None = None
    limit: int | None = None


@dataclass(slots=True)
class _EvaluationState:
    """What came of the pictures so far."""

    found: list[CocoDetection]
    done: list[int]
    failed: list[str]


def evaluate(request: EvaluationRequest, log: TextIO | None = None) -> dict[str, Any]:
    """The figures of a model as a document; progress and what could not be read goes to `tell` (stderr).

    Raises:
        ConfigError: the annotations are none, or the model's labels are not among their categories.
        ModelError, DeviceError, UnavailableError: nothing can be computed.
        SourceError: not one of the pictures is there.
    """
    log = log or sys.stderr
    require_pycocotools()
    annotations = read_annotations(request.coco)
    model = load_model(request.model)
    categories = match_categories(model.labels, annotations)
    photos = _present(annotations, request, log)
    selection = Selection.of(model, SCORE_FLOOR, request.inference.iou)
    # What is measured must not depend on what this machine happened to choose before.
    plain = {"precision": "fp32"} if request.inference.precision == "auto" else {}
    inference = request.inference.model_copy(update=plain)
    with closing(
        open_engine(model, inference, data=request.data, measuring=False, level=logging.DEBUG)
    ) as engine:
        info, began_ns = engine.info(), time.monotonic_ns()
        detect_image = _make_detector(request.images, engine, selection)
        state = _evaluate_images(
            photos, detect_image, info.plan.lanes, categories, _ProgressBar(len(photos), log)
        )
        took_s = (time.monotonic_ns() - began_ns) / 1e9
        device, precision = info.device.effective, info.precision.precision
    for words in state.failed:
        log.write(f"visionedge: {redact(words)}\n")
    return {
        "model": model.name,
        "sha256": model.sha256,
        "device": device,
        "precision": precision,
        "pictures": len(state.done),
        "missing": _requested_count(annotations, request) - len(state.done),
        "classes": len(model.labels),
        "classesWithCategory": len(categories),
        "detections": len(state.found),
        "scoreFloor": SCORE_FLOOR,
        "picturesPerSecond": round(len(state.done) / took_s, 2) if took_s else None,
        **compute_average_precision(annotations, state.done, state.found),
    }


def _requested_count(annotations: Annotations, request: EvaluationRequest) -> int:
    return min(len(annotations.photos), request.limit or len(annotations.photos))


def _present(annotations: Annotations, request: EvaluationRequest, log: TextIO) -> list[AnnotatedImage]:
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
        log.write(
            redact(
                f"visionedge: {request.images}: {len(missing)} of {len(photos)} pictures are not there,"
                f" such as {missing[0]}\n"
            )
        )
    return present


def _make_detector(
    folder: Path, engine: LocalEngine, selection: Selection
) -> Callable[[AnnotatedImage], _Outcome]:
    def detect_image(photo: AnnotatedImage) -> _Outcome:
        try:
            picture = read_picture(folder / photo.file)
        except SourceError as error:
            return error
        return infer_frames([make_frame(picture, engine)], engine, selection)[0]

    return detect_image


def _evaluate_images(
    photos: Sequence[AnnotatedImage],
    detect_image: Callable[[AnnotatedImage], _Outcome],
    lanes: int,
    categories: dict[int, int],
    progress_bar: "_ProgressBar",
) -> _EvaluationState:
    state = _EvaluationState([], [], [])
    with closing(progress_bar):
        for photo, result in _in_order(photos, detect_image, lanes):
            progress_bar.step()
            if isinstance(result, SourceError):
                state.failed.append(str(result))
                continue
            state.done.append(photo.number)
            state.found += _to_coco(photo, result, categories)
    return state


def _in_order(
    photos: Sequence[AnnotatedImage], detect_image: Callable[[AnnotatedImage], _Outcome], lanes: int
) -> Iterator[tuple[AnnotatedImage, _Outcome]]:
    """Each picture with what came of it, while the next ones are computed."""
    waiting: deque[tuple[AnnotatedImage, Future[_Outcome]]] = deque()
    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
        for photo in photos:
            waiting.append((photo, pool.submit(detect_image, photo)))
            if len(waiting) > lanes + 1:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()


def _to_coco(
    photo: AnnotatedImage, result: FrameResult, categories: dict[int, int]
) -> Iterator[CocoDetection]:
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
            yield CocoDetection(photo.number, categories[class_id], place, score)


class _ProgressBar:
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


def format_report(report: dict[str, Any]) -> str:
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
