"""Annotations as COCO writes them, a model's labels among their categories, and average precision."""

import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionedge.errors import ConfigError, UnavailableError
from visionedge.runtime.installation import install_command

# The words of older data sets and of Darknet for COCO's own.
_OTHER_WORDS = {
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
class Photo:
    """A picture of the annotations: its number there and the name of its file."""

    number: int
    file: str


@dataclass(frozen=True, slots=True)
class Annotations:
    """Pictures with boxes that people drew; `categories` are the names by their numbers."""

    document: Mapping[str, Any]
    photos: tuple[Photo, ...]
    categories: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Found:
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
        photos = tuple(Photo(int(image["id"]), str(image["file_name"])) for image in document["images"])
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


def categories_of(labels: Sequence[str], annotations: Annotations) -> dict[int, int]:
    """The category of each class of a model that has one: by name, or by order where it has no names.

    Raises:
        ConfigError: no label is the name of a category.
    """
    numbers = {_key(name): number for number, name in annotations.categories.items()}
    matched = {index: numbers[key] for index, name in enumerate(labels) if (key := _key(name)) in numbers}
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


def _key(name: str) -> str:
    plain = re.sub(r"[\s_-]+", " ", name.strip().lower())
    return _OTHER_WORDS.get(plain, plain)


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
            f"{install_command('eval')}"
        ) from None


def average_precision(
    annotations: Annotations, photos: Sequence[int], found: Sequence[Found]
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


def _entry(found: Found, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": found.photo,
        "category_id": found.category,
        "bbox": list(found.box),
        "area": found.box[2] * found.box[3],
        "score": found.score,
        "iscrowd": 0,
    }
