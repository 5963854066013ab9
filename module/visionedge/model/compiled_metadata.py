"""What a compiled graph says of itself, in its own metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visionedge.errors import ModelError

COMPILED_KEY = "visionedge.compiled"
COMPILED_HEAD = "compiled"

# Keys that describe the network as it was, which the compiled graph is no more.
_OUTDATED_KEYS = frozenset(
    {"visionedge.decode", "anchors", "imgsz", "stride", "task", "batch", "args", "end2end", "nms"}
)

COMPILED_SIGNATURE = (
    "uint8 [N,H,W,3] BGR -> float32 [N,K,6] (left, top, right, bottom in input pixels, score, class)"
)


_RESIZE_KEYS = ("fit", "anchor", "pad", "resample", "rounding")
"""What a compiled graph cannot do by itself to its picture."""


@dataclass(frozen=True, slots=True)
class CompiledMetadata:
    """`batch` is None where it is open, `batch_reason` why it is or is not. `sha256` is the network's.

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
    batch_reason: str
    signature: str = COMPILED_SIGNATURE


def read_compiled_metadata(metadata: Mapping[str, str]) -> CompiledMetadata | None:
    """What a graph's metadata says of it; None where it is none of ours.

    Raises:
        ModelError: it says so, but in words that are not ours.
    """
    if COMPILED_KEY not in metadata:
        return None
    compiled_metadata = None
    try:
        document: dict[str, Any] = json.loads(metadata[COMPILED_KEY])
        compiled_metadata = CompiledMetadata(
            **(document | {"evidence": tuple(map(str, document["evidence"]))})
        )
        sane = (compiled_metadata.batch or 1) > 0 and compiled_metadata.classes >= 0
    except (ValueError, TypeError, KeyError):
        sane = False
    if not sane:
        raise ModelError(
            f"its metadata {COMPILED_KEY} is not as this version writes it; compile the model again"
        )
    return compiled_metadata
