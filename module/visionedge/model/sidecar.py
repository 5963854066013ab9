"""`MODEL.yaml` beside `MODEL.onnx`: statements of the owner where a model cannot be recognised.

    head: yolox                    # one of the known heads
    input: {color: rgb, scale: 0.00392156863, mean: [0, 0, 0], std: [1, 1, 1],
            fit: stretch, anchor: center, pad: 114, width: 640, height: 640}
    labels: [person, forklift]
    nms: true                      # whether overlapping boxes still have to be suppressed
    anchors: [[10, 13], [16, 30], [33, 23]]

Every key is optional. It becomes metadata that a model can also carry itself (``visionedge.head``,
``visionedge.input``, ``visionedge.nms``, ``anchors``, ``names``), and overrides the model's own.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionedge.config.documents import read_document
from visionedge.errors import ConfigError, ModelError
from visionedge.model.heads import load_heads
from visionedge.model.interpretation import INPUT_CHECKS, Check, check_one_of, is_number
from visionedge.model.labels import make_printable

_DATA_YAML_KEYS = frozenset({"path", "train", "val", "test", "nc", "names", "channels", "download"})


@dataclass(frozen=True, slots=True)
class DataYaml:
    """A `data.yaml` of Ultralytics, which often lies beside a model with the name of its `MODEL.yaml`.

    It describes training data. Only its class names are used, and only if neither the model nor a labels file
    names the classes. `names` is empty if they cannot be read.
    """

    file: str
    names: tuple[str, ...]

    def labels(self, labels: tuple[str, ...], origin: str) -> tuple[tuple[str, ...], str]:
        """The labels of a model and their origin: the names of the data set if they fit, else the arguments.

        `labels` is empty if the number of classes is unknown.
        """
        is_guess = origin == "nothing" or origin.endswith("by their number")
        fits = bool(self.names) and len(labels) in (0, len(self.names))
        return (self.names, self.file) if is_guess and fits else (labels, origin)


def parse_data_yaml(file: str, document: Mapping[str, Any], sidecar_keys: Collection[str]) -> DataYaml | None:
    """The data set in a document; None if the document is a `MODEL.yaml`."""
    keys = set(document)
    is_one = "train" in keys or "val" in keys or ("names" in keys and keys <= _DATA_YAML_KEYS)
    if not is_one or keys & set(sidecar_keys):
        return None
    names = document.get("names")
    if isinstance(names, Mapping):
        by_id = {str(key): name for key, name in names.items()}
        names = [by_id.get(str(number)) for number in range(len(by_id))]
    readable = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
    return DataYaml(
        file, tuple(make_printable(str(name).strip()) for name in names) if readable and names else ()
    )


_SIDECAR_KEYS = {
    "visionedge.head": "head",
    "visionedge.input": "input",
    "visionedge.nms": "nms",
    "names": "labels",
}


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The statements as metadata that override the model's own; `name` is the file's.

    `data_yaml` is set instead if the file is a data.yaml of Ultralytics.
    """

    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_yaml: DataYaml | None = None

    @property
    def evidence(self) -> tuple[str, ...]:
        """One clause that names the stated keys; empty if there is no file."""
        words = [_SIDECAR_KEYS.get(key, key) for key in self.metadata]
        return (f"{self.name} states {', '.join(words)}",) if words else ()


def read_sidecar(path: Path) -> Sidecar:
    """The statements in the file beside the model at `path`; empty if there is none.

    Raises:
        ModelError: it cannot be read, or holds something else; every problem with the path of its key.
    """
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return Sidecar()
    try:
        document = read_document(beside)
    except ConfigError as error:
        raise ModelError(str(error)) from None
    if (data_yaml := parse_data_yaml(beside.name, document, _KEYS)) is not None:
        return Sidecar(data_yaml=data_yaml)
    inner = document.get("input")
    problems = _find_problems(document, _KEYS, "")
    problems += _find_problems(inner, INPUT_CHECKS, "input.") if isinstance(inner, dict) else []
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


def _find_problems(document: Mapping[str, Any], checks: Mapping[str, Check], where: str) -> list[str]:
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


def _check_head(value: Any) -> str | None:
    names = [head.name for head in load_heads() if head.name != "compiled"]
    if value in names:
        return None
    close = difflib.get_close_matches(str(value)[:80], names, n=1, cutoff=0.6)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"must be the name of a known head{hint}; known: {', '.join(names)}"


def _check_mapping(value: Any) -> str | None:
    return None if isinstance(value, dict) else "must be a mapping of keys such as 'color:'"


def _check_boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _check_labels(value: Any) -> str | None:
    right = isinstance(value, list) and value and all(isinstance(v, str) and v.strip() for v in value)
    if isinstance(value, list) and any(isinstance(v, bool) for v in value):
        return "must be words; put quotes around yes, no, on and off, which YAML reads as true and false"
    return None if right else "must be a list of words, one for each class"


def _check_anchors(value: Any) -> str | None:
    flat: list[Any] = [value]
    while any(isinstance(item, list) for item in flat):
        flat = [inner for item in flat for inner in (item if isinstance(item, list) else [item])]
    right = isinstance(value, list) and len(flat) >= 2 and len(flat) % 2 == 0
    if right and all(is_number(v) and v > 0 for v in flat):
        return None
    return "must be pairs of a width and a height, such as [[10, 13], [16, 30]]"


_KEYS: Mapping[str, Check] = {
    "head": _check_head,
    "input": _check_mapping,
    "labels": _check_labels,
    "nms": _check_boolean,
    "anchors": _check_anchors,
    "boxes": check_one_of("corners", "centers"),
}
