"""The labels of a model's classes: from its metadata, a file beside it, or COCO by the number of classes."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path

from visionedge.errors import ModelError

COCO_80 = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog"),
    *("horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag"),
    *("tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat"),
    *("baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork"),
    *("knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog"),
    *("pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv"),
    *("laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

# Of the category numbers 1 to 90, those that COCO's detection task does not use.
_UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})

_MAX_BYTES = 1 << 20

AUTOML_BACKGROUND = "--bg--"
"""The first label in the labels.json of Azure AutoML's detectors with a background."""

LABELS_FILE_KEY = "visionedge.labelsFile"
"""The metadata key with the name of the labels file beside a model."""

_BACKGROUND_NAMES = frozenset({"background", "bg", "n/a"})
_JOINERS = "\u200c\u200d"  # they join letters in many scripts


def read_class_names(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The labels in the metadata key `names`, by class id; None if it is absent.

    It may be a JSON or Python list, or a mapping from ids to names; it is read as data, never run.

    Raises:
        ModelError: it is something else.
    """
    text = metadata.get("names")
    if text is None:
        return None
    value = _parse_literal(text)
    if isinstance(value, dict):
        try:
            value = {int(key): name for key, name in value.items()}
        except (TypeError, ValueError):
            value = None
        else:
            value = [value.get(i) for i in range(len(value))]
    if isinstance(value, list | tuple):  # digits are named by themselves
        value = [str(n) if isinstance(n, int) and not isinstance(n, bool) else n for n in value]
    if not isinstance(value, list) or not value or not all(isinstance(n, str) for n in value):
        raise ModelError(
            "its metadata key 'names' is neither a list of labels nor a mapping from 0, 1, 2 … to labels"
        )
    return tuple(map(make_printable, value))


def count_class_names(metadata: Mapping[str, str]) -> int:
    """The number of labels in the metadata key `names`; 0 if it is absent. Raises as `read_class_names`."""
    return len(read_class_names(metadata) or ())


def make_printable(label: str) -> str:
    """A label without control characters, which could drive a terminal or change the direction of a line."""
    if label.isprintable():
        return label
    shown = (c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "?" for c in label)
    return "".join(shown).strip() or "?"


def _parse_literal(text: str) -> object:
    if len(text) > _MAX_BYTES:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # Python may have written it
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def find_labels_file(path: Path) -> Path | None:
    """The labels file beside the model at `path`, if there is one."""
    names = (f"{path.stem}.labels.txt", "labels.txt")
    return next((file for name in names if (file := path.with_name(name)).is_file()), None)


def note_labels_file(path: Path) -> Mapping[str, str]:
    """As metadata, the name of the labels file beside the model at `path`; empty if there is none."""
    beside = find_labels_file(path)
    return {} if beside is None else {LABELS_FILE_KEY: beside.name}


def choose_labels(
    path: Path,
    metadata: Mapping[str, str],
    count: int,
    label_source: str = "its metadata",
    *,
    background: bool = False,
    are_objects: bool = True,
) -> tuple[tuple[str, ...], str]:
    """The labels of `count` classes and their origin; count 0 if the number is unknown.

    `label_source` is the origin of the metadata. `background`: class 0 is the background, and the labels may
    leave it out. `are_objects`: 80, 90 or 91 classes without labels are COCO's.

    Raises:
        ModelError: labels are given, but not for that number of classes.
    """
    names = read_class_names(metadata)
    if names is not None:
        return _check_count(names, count, label_source, background), label_source
    if (beside := find_labels_file(path)) is not None:
        return _check_count(_read_lines(beside), count, beside.name, background), beside.name
    if not count:
        return (), "nothing"
    if count == 80 and are_objects:
        return COCO_80, "COCO by their number"
    if count in (90, 91) and are_objects:
        return _make_tensorflow_labels(count), "TensorFlow's COCO by their number"
    return tuple(f"class-{i}" for i in range(count)), "nothing"


def _check_count(names: tuple[str, ...], count: int, origin: str, background: bool) -> tuple[str, ...]:
    """The names, with one for the background in front if they leave it out."""
    behind = names
    if background and len(names) != count and names[0].strip("-_ ").lower() not in _BACKGROUND_NAMES:
        behind = ("background", *names)
    if len(behind) != count and count:
        more = " (and the background)" if background else ""
        raise ModelError(f"it has {count - background} classes{more}, but {origin} names {len(names)}")
    return behind


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ModelError(f"{path}: cannot be read: {reason}") from None
    if len(content) > _MAX_BYTES:
        raise ModelError(
            f"{path}: is larger than {_MAX_BYTES >> 20} MiB; a labels file has one label per line"
        )
    return tuple(make_printable(line.strip()) for line in text.rstrip().splitlines())


def _make_tensorflow_labels(count: int) -> tuple[str, ...]:
    """COCO's category numbers as ids: from 0 if there are 90, behind a background if there are 91."""
    names = iter(COCO_80)
    by_number = [f"class-{n}" if n in _UNUSED_IDS else next(names) for n in range(1, 91)]
    return tuple(by_number) if count == 90 else ("background", *by_number)
