"""What a compiled graph says of itself, in its own metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visionedge.errors import ModelError

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
