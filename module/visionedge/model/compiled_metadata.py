"""The metadata that a compiled graph carries about itself.

`compiler/build.py` writes it, `heads/compiled.py` reads it. It is JSON under the key `visionedge.compiled`
of the ONNX file. Its keys are a file format: graphs compiled by an earlier version must stay readable.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import onnx

from visionedge.errors import ModelError

COMPILED_KEY = "visionedge.compiled"
COMPILED_HEAD = "compiled"

COMPILED_SIGNATURE = (
    "uint8 [N,H,W,3] BGR -> float32 [N,K,6] (left, top, right, bottom in input pixels, score, class)"
)

OUTDATED_KEYS = frozenset(
    {"visionedge.decode", "anchors", "imgsz", "stride", "task", "batch", "args", "end2end", "nms"}
)
"""Metadata keys of the original network that are wrong for the compiled graph."""

RESIZE_KEYS = ("fit", "anchor", "pad", "resample", "rounding")
"""The fields of `Preprocess` for the resizing, which happens outside the graph."""

_JSON_KEYS = {"batch_reason": "batch_words"}
"""The keys in the file of those fields of `CompiledMetadata` that have another name there."""


@dataclass(frozen=True, slots=True)
class CompiledMetadata:
    """What a compiled graph was made from.

    `sha256` is that of the original file. `rows` is K, the most rows per picture. `batch` is None if any
    number of pictures can be computed at once; `batch_reason` explains it.
    """

    version: str
    name: str
    sha256: str
    head: str
    classes: int
    evidence: tuple[str, ...]
    rows: int
    batch: int | None
    batch_reason: str
    signature: str = COMPILED_SIGNATURE

    def to_json(self) -> str:
        """The value of the metadata key `visionedge.compiled`."""
        return json.dumps({_JSON_KEYS.get(field, field): value for field, value in asdict(self).items()})

    @staticmethod
    def from_json(text: str) -> "CompiledMetadata":
        """The reverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: the text is not what `to_json` writes.
        """
        fields = {key: field for field, key in _JSON_KEYS.items()}
        document = {fields.get(key, key): value for key, value in json.loads(text).items()}
        made = CompiledMetadata(**(document | {"evidence": tuple(map(str, document["evidence"]))}))
        if (made.batch or 1) <= 0 or made.classes < 0:
            raise ValueError("batch and classes must not be negative")
        return made


def read_compiled_metadata(metadata: Mapping[str, str]) -> CompiledMetadata | None:
    """The compiled metadata among a file's metadata; None if visionedge did not compile the graph.

    Raises:
        ModelError: the key is there, but its value is damaged.
    """
    if COMPILED_KEY not in metadata:
        return None
    try:
        return CompiledMetadata.from_json(metadata[COMPILED_KEY])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelError(
            f"its metadata {COMPILED_KEY} cannot be read by this version; compile the model again"
        ) from None


def require_compiled_metadata(graph: onnx.ModelProto) -> CompiledMetadata:
    """The compiled metadata of a graph that must have it.

    Raises:
        ModelError: visionedge did not compile the graph.
    """
    metadata = read_compiled_metadata({entry.key: entry.value for entry in graph.metadata_props})
    if metadata is None:
        raise ModelError("was not compiled by visionedge")
    return metadata
