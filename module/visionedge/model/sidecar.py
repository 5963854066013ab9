"""`MODEL.yaml` beside `MODEL.onnx`: what its owner states outright where recognition cannot see it.

    head: yolox                    # one of the known heads
    input: {color: rgb, scale: 0.00392156863, mean: [0, 0, 0], std: [1, 1, 1],
            fit: stretch, anchor: center, pad: 114, width: 640, height: 640}
    labels: [person, forklift]
    nms: true                      # whether overlapping boxes still have to be suppressed
    anchors: [[10, 13], [16, 30], [33, 23]]

Every key may be left out. It becomes metadata as the model itself can carry it (``visionedge.head``,
``visionedge.input``, ``visionedge.nms``, ``anchors``, ``names``) and wins over the model's own.
"""

import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from visionedge.config.documents import read_file
from visionedge.errors import ConfigError, ModelError
from visionedge.frames.types import Anchor, Fit, Resample, Rounding
from visionedge.model.heads import known_heads
from visionedge.model.interpretation import MOST_SIDE_PX, Color

# A `data.yaml` of Ultralytics, which often lies beside a model under the name of its `MODEL.yaml`.
#
# It describes the data that a model was trained with and not how the model is read, so only its class names
# are taken, and only where neither the model nor a file of labels names its classes.


_DATA_SET_KEYS = frozenset({"path", "train", "val", "test", "nc", "names", "channels", "download"})


@dataclass(frozen=True, slots=True)
class DataSet:
    """The name of the file, and the names of the classes; none where they cannot be read."""

    file: str
    names: tuple[str, ...]

    def labels(self, labels: tuple[str, ...], origin: str) -> tuple[tuple[str, ...], str]:
        """The labels of a model and where they came from, by the names of the data set where these fit.

        `labels` and `origin` are what is known without it; no label where the number of classes is unknown.
        """
        is_guess = origin == "nothing" or origin.endswith("by their number")
        fits = bool(self.names) and len(labels) in (0, len(self.names))
        return (self.names, self.file) if is_guess and fits else (labels, origin)


def data_set_of(file: str, document: Mapping[str, Any], keys_of_ours: Collection[str]) -> DataSet | None:
    """The data set that a document describes; None where it is a `MODEL.yaml`."""
    keys = set(document)
    is_one = "train" in keys or "val" in keys or ("names" in keys and keys <= _DATA_SET_KEYS)
    if not is_one or keys & set(keys_of_ours):
        return None
    names = document.get("names")
    if isinstance(names, Mapping):
        by_id = {str(key): name for key, name in names.items()}
        names = [by_id.get(str(number)) for number in range(len(by_id))]
    readable = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
    return DataSet(file, tuple(_printable(str(name)) for name in names) if readable and names else ())


def _printable(name: str) -> str:
    """A name as it may stand in a line of a log."""
    return "".join(character if character.isprintable() else "?" for character in name).strip() or "?"


Check = Callable[[Any], str | None]
"""What a value must be, in words; None where it is that."""

_WORDS = {"visionedge.head": "head", "visionedge.input": "input", "visionedge.nms": "nms", "names": "labels"}


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What is stated, as metadata to be laid over the model's own; `name` is the file's.

    `data_set` is what the file describes in place of that, where it is a data.yaml of Ultralytics.
    """

    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_set: DataSet | None = None

    @property
    def evidence(self) -> tuple[str, ...]:
        """One clause naming what it states; none where there is no file."""
        words = [_WORDS.get(key, key) for key in self.metadata]
        return (f"{self.name} states {', '.join(words)}",) if words else ()


def read_sidecar(path: Path) -> Sidecar:
    """What the file beside the model at `path` states; nothing where there is none.

    Raises:
        ModelError: it cannot be read, or holds something else; every problem with the path of its key.
    """
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return Sidecar()
    try:
        document = read_file(beside)
    except ConfigError as error:
        raise ModelError(str(error)) from None
    if (data_set := data_set_of(beside.name, document, _KEYS)) is not None:
        return Sidecar(data_set=data_set)
    inner = document.get("input")
    problems = _problems(document, _KEYS, "")
    problems += _problems(inner, _INPUT, "input.") if isinstance(inner, dict) else []
    if problems:
        raise ModelError(f"{beside}: {'; '.join(problems)}")
    return Sidecar(beside.name, _metadata(document))


def _metadata(document: Mapping[str, Any]) -> dict[str, str]:
    stated = {}
    if "head" in document:
        stated["visionedge.head"] = str(document["head"])
    for key in ("input", "nms"):
        if key in document:
            stated[f"visionedge.{key}"] = json.dumps(document[key])
    if "boxes" in document:
        stated["visionedge.form"] = document["boxes"]
    if "anchors" in document:
        stated["anchors"] = json.dumps(document["anchors"])
    if "labels" in document:
        stated["names"] = json.dumps(document["labels"])
    return stated


def _problems(document: Mapping[str, Any], checks: Mapping[str, Check], where: str) -> list[str]:
    problems = []
    for key, value in document.items():
        check = checks.get(key)
        wrong = f"unknown key{_suggestion(key, checks)}" if check is None else check(value)
        if wrong is not None:
            problems.append(f"{where}{key}: {wrong}")
    return problems


def _suggestion(key: str, known: Mapping[str, Check]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known here: {', '.join(known)}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(*choices: str) -> Check:
    return lambda value: None if value in choices else f"must be {' or '.join(choices)}"


def _a_head(value: Any) -> str | None:
    names = [head.name for head in known_heads() if head.name != "compiled"]
    if value in names:
        return None
    close = difflib.get_close_matches(str(value)[:80], names, n=1, cutoff=0.6)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"must be the name of a known head{hint}; known: {', '.join(names)}"


def _a_mapping(value: Any) -> str | None:
    return None if isinstance(value, dict) else "must be a mapping of keys such as 'color:'"


def _a_truth(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _a_scale(value: Any) -> str | None:
    return None if _number(value) and value > 0 else "must be a number above 0, such as 0.00392156863"


def _a_level(value: Any) -> str | None:
    right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
    return None if right else "must be a grey level, 0 to 255"


def _a_side(value: Any) -> str | None:
    right = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_SIDE_PX
    return None if right else f"must be a number of pixels, 1 to {MOST_SIDE_PX}"


def _three(zero: bool) -> Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, list) and len(value) == 3 and all(_number(v) for v in value)
        if right and (zero or 0 not in value):
            return None
        return "must be three numbers" if zero else "must be three numbers, none of them 0"

    return check


def _some_labels(value: Any) -> str | None:
    right = isinstance(value, list) and value and all(isinstance(v, str) and v.strip() for v in value)
    return None if right else "must be a list of words, one for each class"


def _some_anchors(value: Any) -> str | None:
    flat: list[Any] = [value]
    while any(isinstance(item, list) for item in flat):
        flat = [inner for item in flat for inner in (item if isinstance(item, list) else [item])]
    right = isinstance(value, list) and len(flat) >= 2 and len(flat) % 2 == 0
    if right and all(_number(v) and v > 0 for v in flat):
        return None
    return "must be pairs of a width and a height, such as [[10, 13], [16, 30]]"


_KEYS: Mapping[str, Check] = {
    "head": _a_head,
    "input": _a_mapping,
    "labels": _some_labels,
    "nms": _a_truth,
    "anchors": _some_anchors,
    "boxes": _one_of("corners", "centers"),
}
_INPUT: Mapping[str, Check] = {
    "color": _one_of(*get_args(Color)),
    "scale": _a_scale,
    "mean": _three(zero=True),
    "std": _three(zero=False),
    "fit": _one_of(*get_args(Fit)),
    "anchor": _one_of(*get_args(Anchor)),
    "pad": _a_level,
    "resample": _one_of(*get_args(Resample)),
    "rounding": _one_of(*get_args(Rounding)),
    "width": _a_side,
    "height": _a_side,
}
