"""What a compiled graph says of itself, in its own metadata: whoever has the file needs nothing else.

visionedge.compiled   JSON: of what, by what, for which picture (`Imprint`)
visionedge.head       "compiled", so that it is read back as what it is
visionedge.input      how a picture is to be resized
visionedge.nms        whether boxes still need suppression
names                 the labels, as a JSON list
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import helper

from visionedge import __version__
from visionedge.errors import ModelError
from visionedge.model.model import Model

KEY = "visionedge.compiled"
HEAD = "compiled"

# Keys that describe the network as it was, which the compiled graph is no more.
_OUTDATED = frozenset(
    {"visionedge.decode", "anchors", "imgsz", "stride", "task", "batch", "args", "end2end", "nms"}
)

SIGNATURE = "uint8 [N,H,W,3] BGR -> float32 [N,K,6] (left, top, right, bottom in input pixels, score, class)"


_RESIZING = ("fit", "anchor", "pad", "resample", "rounding")
"""What a compiled graph cannot do by itself to its picture."""


@dataclass(frozen=True, slots=True)
class Imprint:
    """`batch` is None where it is open, `batch_words` why it is or is not. `sha256` is the network's.

    `rows` is K, the most rows a picture gives.
    """

    version: str
    name: str
    sha256: str
    head: str
    classes: int
    evidence: tuple[str, ...]
    rows: int
    batch: int | None
    batch_words: str
    signature: str = SIGNATURE


def stamp(graph: onnx.ModelProto, model: Model, *, rows: int, batch: int | None, batch_words: str) -> None:
    """Write into a compiled graph what it is, over what the network said of itself."""
    reading, way = model.reading, model.reading.preprocess
    imprint = Imprint(
        *(__version__, model.name, model.sha256, model.head, reading.class_count, model.evidence),
        *(rows, batch, batch_words),
    )
    metadata = {entry.key: entry.value for entry in graph.metadata_props if entry.key not in _OUTDATED}
    metadata |= {
        KEY: json.dumps(asdict(imprint)),
        "visionedge.head": HEAD,
        "visionedge.input": json.dumps({key: getattr(way, key) for key in _RESIZING}),
        "visionedge.nms": json.dumps(reading.suppress),
    }
    if model.labels:
        metadata["names"] = json.dumps(model.labels)
    del graph.metadata_props[:]
    helper.set_model_props(graph, metadata)
    graph.producer_name, graph.producer_version = "visionedge", __version__
    graph.doc_string = f"{model.name}, compiled by visionedge: {SIGNATURE}"


def read_imprint(metadata: Mapping[str, str]) -> Imprint | None:
    """What a graph's metadata says of it; None where it is none of ours.

    Raises:
        ModelError: it says so, but in words that are not ours.
    """
    if KEY not in metadata:
        return None
    imprint = None
    try:
        document: dict[str, Any] = json.loads(metadata[KEY])
        imprint = Imprint(**(document | {"evidence": tuple(map(str, document["evidence"]))}))
        sane = (imprint.batch or 1) > 0 and imprint.classes >= 0
    except (ValueError, TypeError, KeyError):
        sane = False
    if not sane:
        raise ModelError(f"its metadata {KEY} is not as this version writes it; compile the model again")
    return imprint


def imprint_of(graph: onnx.ModelProto) -> Imprint:
    """What a graph says of itself that was built here.

    Raises:
        ModelError: it was not.
    """
    imprint = read_imprint({entry.key: entry.value for entry in graph.metadata_props})
    if imprint is None:
        raise ModelError("was not compiled here")
    return imprint
