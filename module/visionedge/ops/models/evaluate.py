"""`visionedge model eval`: the average precision of a model on annotated pictures, as COCO computes it.

The pictures go through the same preprocessing, engine and postprocessing as those of a camera; pycocotools
computes the figures.
"""

import contextlib
import io
import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from visionedge.camera.sources.images import read_picture
from visionedge.config.schema import InferenceConfig
from visionedge.engine.lanes import infer_frames, make_frame
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.errors import ConfigError, SourceError, UnavailableError
from visionedge.frames.types import Detections, FrameResult
from visionedge.model.model import load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.clips import VideoProgress, map_ahead
from visionedge.runtime.installation import build_install_command
from visionedge.runtime.redaction import redact

SCORE_FLOOR = 0.01
"""Average precision covers the whole curve; detections below this score do not change it."""

# The labels of older data sets and of Darknet for COCO's categories.
_LABEL_SYNONYMS = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_FIGURES = ("ap", "ap50", "ap75", "apSmall", "apMedium", "apLarge", "ar1", "ar10", "ar100")
"""In the order of pycocotools."""


@dataclass(frozen=True, slots=True)
class Annotations:
    """Annotated pictures: ids and file names in order, and the names of the categories by id."""

    document: Mapping[str, Any]
    photos: tuple[tuple[int, str], ...]
    categories: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class CocoDetection:
    """One detection with COCO's keys; `bbox` is left, top, width, height in pixels of the picture."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """The arguments of `model eval`. `limit`: only the first pictures. Precision `auto` means fp32."""

    model: Path
    coco: Path
    images: Path
    inference: InferenceConfig
    data: Path | None = None
    limit: int | None = None


def evaluate(request: EvaluationRequest, log: TextIO | None = None) -> dict[str, Any]:
    """The figures of a model as a document; progress and unreadable pictures go to `log` (stderr).

    Raises:
        ConfigError: the annotations are not valid, or no label of the model matches a category.
        ModelError, DeviceError, UnavailableError: the model cannot run.
        SourceError: none of the pictures exists.
    """
    log = log or sys.stderr
    require_pycocotools()
    annotations = read_annotations(request.coco)
    model = load_model(request.model)
    categories = match_categories(model.labels, annotations)
    photos = _present(annotations, request, log)
    selection = Selection.of(model, SCORE_FLOOR, request.inference.iou)
    # The result must not depend on the variant that this machine chose before.
    plain = {"precision": "fp32"} if request.inference.precision == "auto" else {}
    inference = request.inference.model_copy(update=plain)
    with closing(
        open_engine(model, inference, data=request.data, measuring=False, level=logging.DEBUG)
    ) as engine:
        info, began_ns = engine.info(), time.monotonic_ns()
        done: list[int] = []
        found: list[CocoDetection] = []
        for number, result in _detect_images(photos, request.images, engine, selection, log):
            done.append(number)
            size = result.frame.width_px, result.frame.height_px
            found += to_coco(number, *size, result.detections, categories)
        took_s = (time.monotonic_ns() - began_ns) / 1e9
    return {
        "model": model.name,
        "sha256": model.sha256,
        "device": info.device.effective,
        "runtime": info.runtime,
        "precision": info.precision.precision,
        "pictures": len(done),
        "missing": len(annotations.photos[: request.limit]) - len(done),
        "classes": len(model.labels),
        "classesWithCategory": len(categories),
        "detections": len(found),
        "scoreFloor": SCORE_FLOOR,
        "picturesPerSecond": round(len(done) / took_s, 2) if took_s else None,
        **compute_average_precision(annotations, done, found),
    }


def _present(annotations: Annotations, request: EvaluationRequest, log: TextIO) -> list[tuple[int, str]]:
    """The pictures that exist; one line on stderr for the missing ones.

    Raises:
        SourceError: none exists.
    """
    photos = annotations.photos[: request.limit]
    present = [(number, file) for number, file in photos if (request.images / file).is_file()]
    missing = [file for _, file in photos if not (request.images / file).is_file()]
    if not present:
        raise SourceError(
            f"{request.images}: none of the {len(photos)} pictures exists, such as {missing[0]}"
        )
    if missing:
        log.write(
            redact(
                f"visionedge: {request.images}: {len(missing)} of {len(photos)} pictures are missing,"
                f" such as {missing[0]}\n"
            )
        )
    return present


def _detect_images(
    photos: Sequence[tuple[int, str]], folder: Path, engine: LocalEngine, selection: Selection, log: TextIO
) -> Iterator[tuple[int, FrameResult]]:
    """The results of the pictures by their ids; unreadable ones are reported at the end."""

    def detect_image(photo: tuple[int, str]) -> FrameResult | SourceError:
        try:
            picture = read_picture(folder / photo[1])
        except SourceError as error:
            return error
        return infer_frames([make_frame(picture, engine)], engine, selection)[0]

    failed: list[SourceError] = []
    title = f"{folder} ({len(photos)} pictures)"
    with (
        closing(VideoProgress(log, owns_terminal=True)) as progress,
        closing(map_ahead(detect_image, photos, engine.info().plan.lanes)) as results,
    ):
        for number, (photo, result) in enumerate(results, 1):
            progress.note(title, number, video=True)
            if not log.isatty() and number * 10 // len(photos) > (number - 1) * 10 // len(photos):
                log.write(f"{number}/{len(photos)} pictures\n")  # ten lines in all
            if isinstance(result, SourceError):
                failed.append(result)
            else:
                yield photo[0], result
    log.writelines(f"visionedge: {redact(str(error))}\n" for error in failed)


def to_coco(
    number: int, width_px: int, height_px: int, detections: Detections, categories: Mapping[int, int]
) -> Iterator[CocoDetection]:
    """The detections of one picture whose class has a category; `number` is that of the picture."""
    rows = zip(
        detections.boxes.tolist(), detections.scores.tolist(), detections.class_ids.tolist(), strict=True
    )
    for (left, top, right, bottom), score, class_id in rows:
        if class_id in categories:
            size = ((right - left) * width_px, (bottom - top) * height_px)
            yield CocoDetection(
                number, categories[class_id], (left * width_px, top * height_px, *size), score
            )


def format_report(report: dict[str, Any]) -> str:
    """The figures as text, in COCO's order."""
    rows = [
        ("AP", "ap", "IoU 0.50-0.95"),
        ("AP50", "ap50", "IoU 0.50"),
        ("AP75", "ap75", "IoU 0.75"),
        ("AP small", "apSmall", "less than 32 x 32"),
        ("AP medium", "apMedium", "up to 96 x 96"),
        ("AP large", "apLarge", "larger"),
        ("AR 100", "ar100", "recall with 100 boxes per picture"),
    ]
    head = (
        f"{report['model']} in {report['precision']} on {report['device']}: {report['pictures']} pictures,"
        f" {report['detections']} detections with a score of at least {report['scoreFloor']},"
        f" {report['classesWithCategory']} of {report['classes']} classes have a category\n"
    )
    return head + "".join(
        f"  {name:<10} {'-' if report[key] is None else format(report[key], '.3f'):>6}   {note}\n"
        for name, key, note in rows
    )


# --- annotations, categories and average precision ----------------------------------------------------------


def read_annotations(path: Path) -> Annotations:
    """Read a file such as ``instances_val2017.json``.

    Raises:
        ConfigError: the file cannot be read, or is not in COCO's format.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"--coco {path}: cannot be read: {error.strerror}"]) from None
    except (ValueError, RecursionError):
        raise ConfigError([f"--coco {path}: is not a JSON file"]) from None
    try:
        photos = tuple((int(image["id"]), str(image["file_name"])) for image in document["images"])
        categories = {int(entry["id"]): str(entry["name"]) for entry in document["categories"]}
        boxes = [_box(entry, number) for number, entry in enumerate(document["annotations"], start=1)]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            [f"--coco {path}: is not in COCO's format (images, categories, annotations with bbox)"]
        ) from None
    if not photos or not categories:
        raise ConfigError([f"--coco {path}: has no images or no categories"])
    whole = {"info": {}, "images": document["images"], "categories": document["categories"]}
    return Annotations(whole | {"annotations": boxes}, photos, categories)


def _box(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """An annotation as pycocotools needs it, without its outline."""
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
    """The category of each class of a model: by name, or by order if the model has no names.

    Raises:
        ConfigError: no label matches a category.
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
            " put the correct labels into MODEL.labels.txt beside the model"
        ]
    )


def _normalize_label(name: str) -> str:
    plain = re.sub(r"[\s_-]+", " ", name.strip().lower())
    return _LABEL_SYNONYMS.get(plain, plain)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")


def require_pycocotools() -> None:
    """Check for pycocotools before minutes of computing.

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
    """COCO's figures over these pictures; None for a figure without annotations."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, seen = COCO(), COCO()
    truth.dataset = dict(annotations.document)
    entries = [
        {
            **asdict(each),
            "bbox": list(each.bbox),
            "id": number,
            "area": each.bbox[2] * each.bbox[3],
            "iscrowd": 0,
        }
        for number, each in enumerate(found, 1)
    ]
    seen.dataset = {**annotations.document, "annotations": entries}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth.createIndex()
        seen.createIndex()
        score = COCOeval(truth, seen, "bbox")
        score.params.imgIds = sorted(photos)
        score.evaluate()
        score.accumulate()
        score.summarize()
    figures = zip(_FIGURES, score.stats, strict=False)
    return {name: float(value) if value >= 0 else None for name, value in figures}
