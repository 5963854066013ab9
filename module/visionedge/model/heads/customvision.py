"""Azure Custom Vision: *compact* outputs one raw map of five anchors, *compact [S1]* a finished list.

The metadata of both state the colour order and the scaling of pixels; `cvexport.manifest` beside the model
can complete them.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from visionedge.errors import ModelError
from visionedge.model.analysis.input_ops import InputOps
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import AnchorMap, AnchorMapDecoder, convert_list_to_rows, to_pixels
from visionedge.model.exporter_files import (
    is_custom_vision,
    parse_custom_vision_manifest,
    parse_custom_vision_preprocess,
)
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    NetworkInput,
    find_only_input,
    read_metadata_object,
)
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import interpret

DEFAULT_ANCHORS = ((0.573, 0.677), (1.87, 2.06), (3.34, 5.47), (7.88, 3.53), (9.77, 9.17))
"""(width, height) in cells of the map: those of all exports that do not state others."""

_STRIDE_PX = 32


@dataclass(frozen=True, slots=True)
class CustomVisionListDecoder(Decoder):
    """Decodes `boxes` [N, n, 4] (or [n, 4]) from 0 to 1, `classes` and `scores` [N, n] (or [n])."""

    boxes: str
    classes: str
    scores: str
    count: int | None
    width_px: int
    height_px: int

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        boxes = nodes.reshape(nodes.cast(self.boxes, "float32"), 1, -1, 4)
        scores, classes = (
            nodes.reshape(nodes.cast(tensor, "float32"), 1, -1) for tensor in (self.scores, self.classes)
        )
        boxes = to_pixels(nodes, boxes, self.width_px, self.height_px)
        return convert_list_to_rows(nodes, boxes, scores, classes, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class CustomVisionCompact:
    """*General (compact)*: [N, anchors * (5 + classes), rows, columns]."""

    name: str = "customvision"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there is one raw map at stride 32, and Custom Vision exported the model.

        Raises:
            ModelError: its metadata contradicts itself, or does not state the scaling of pixels.
        """
        picture = _find_picture(signature, self.name)
        found = _find_map(signature, picture) if picture is not None else None
        if picture is None or found is None:
            return None
        output, width = found
        anchors, origin = _read_anchors(signature)
        classes = width // len(anchors) - 5
        if classes < 1 or width % len(anchors):
            return None
        rows, columns = picture.height_px // _STRIDE_PX, picture.width_px // _STRIDE_PX
        sizes = tuple((width * _STRIDE_PX, height * _STRIDE_PX) for width, height in anchors)
        raw = AnchorMap(output, columns, rows, _STRIDE_PX, _STRIDE_PX, sizes)
        decoder = AnchorMapDecoder(
            (raw,), classes, "channels-first", centre=_read_centre_decoding(signature), scores="softmax"
        )
        return _interpret(
            self.name,
            signature,
            picture,
            decoder,
            classes=classes,
            evidence=(f"one raw map of {len(anchors)} anchors and {classes} classes", origin),
        )


@dataclass(frozen=True, slots=True)
class CustomVisionCompactS1:
    """*General (compact) [S1]*: boxes, classes and scores after suppression; one picture at a time."""

    name: str = "customvision-s1"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there are these three outputs, and Custom Vision exported the model.

        Raises:
            ModelError: its metadata contradicts itself, or does not state the scaling of pixels.
        """
        picture = _find_picture(signature, self.name)
        found = _find_list(signature)
        if picture is None or found is None or picture.batch not in (None, 1):
            return None
        boxes, classes, scores = found
        return _interpret(
            self.name,
            signature,
            replace(picture, batch=1),
            CustomVisionListDecoder(
                boxes.name, classes.name, scores.name, boxes.side(-2), picture.width_px, picture.height_px
            ),
            classes=signature.classes.from_nms or count_class_names(signature.metadata),
            evidence=("three outputs: boxes 0-1, classes and scores",),
        )


HEADS = (CustomVisionCompact(), CustomVisionCompactS1())


def _find_picture(signature: ModelSignature, name: str) -> NetworkInput | None:
    """The picture input of a model that Custom Vision exported; None for any other model."""
    document = parse_custom_vision_manifest(signature)
    if document is not None and document.get("DomainType", "ObjectDetection") != "ObjectDetection":
        return None
    is_own = is_custom_vision(signature) or signature.states_head(name)
    return find_only_input(signature) if is_own else None


def _find_map(signature: ModelSignature, picture: NetworkInput) -> tuple[str, int] | None:
    """The one raw map at stride 32 and its number of channels."""
    if len(signature.outputs) != 1:
        return None
    (output,) = signature.outputs
    output_ops, width = signature.ops(output), output.side(1)
    sides = (picture.height_px // _STRIDE_PX, picture.width_px // _STRIDE_PX)
    if output.rank != 4 or (output.side(2), output.side(3)) != sides or not width:
        return None
    is_raw = output_ops.parts == ("Conv",) and not output_ops.has_arithmetic
    return (output.name, width) if is_raw or not output_ops.has_weights else None


def _read_anchors(signature: ModelSignature) -> tuple[tuple[tuple[float, float], ...], str]:
    """The anchors in cells, and their origin."""
    stated = signature.metadata.get("anchors")
    exported = signature.metadata.get("CustomVision.Postprocess.Yolo.Biases", "null")
    document = parse_custom_vision_manifest(signature) or {}
    for text, origin in (
        (stated, "anchors as stated"),
        (exported, "anchors as its metadata says"),
        (json.dumps(document.get("Anchors")), "anchors as cvexport.manifest says"),
    ):
        value = _parse_list(text)
        if value is None:
            continue
        flat = [number for item in value for number in (item if isinstance(item, list) else [item])]
        right = all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in flat)
        if not right or not flat or len(flat) % 2:
            raise ModelError(f"{origin} are not a list of widths and heights")
        return tuple(zip(flat[::2], flat[1::2], strict=True)), origin
    return DEFAULT_ANCHORS, "the anchors of all exports that do not state others"


def _parse_list(text: str | None) -> list[Any] | None:
    """A list in JSON; None if there is nothing."""
    try:
        value = json.loads(text or "null")
    except ValueError:
        value = [""]
    return value if isinstance(value, list) else None


def _read_centre_decoding(signature: ModelSignature) -> Any:
    """How centres are decoded: as Custom Vision's own samples do, unless stated."""
    centre = read_metadata_object(signature, "visionedge.decode").get("centre", "linear")
    if centre not in ("linear", "sigmoid"):
        raise ModelError("metadata visionedge.decode: centre must be linear or sigmoid")
    return centre


def _find_list(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo, TensorInfo] | None:
    """(boxes, classes, scores) by shape; the last two by type or, if their types are equal, by name."""
    outputs = signature.outputs
    boxes = [t for t in outputs if t.side(-1) == 4 and t.rank in (2, 3)]
    flat = [t for t in outputs if t.rank in (1, 2) and t not in boxes]
    if len(outputs) != 3 or len(boxes) != 1 or len(flat) != 2:
        return None
    if any(t.rank != boxes[0].rank - 1 for t in flat):
        return None
    classes = [t for t in flat if t.is_integer] or [t for t in flat if "class" in t.name.lower()]
    if len(classes) != 1:
        return None
    scores = next(t for t in flat if t is not classes[0])
    return (boxes[0], classes[0], scores) if scores.is_float else None


def _interpret(
    name: str,
    signature: ModelSignature,
    picture: NetworkInput,
    decoder: AnchorMapDecoder | CustomVisionListDecoder,
    *,
    classes: int,
    evidence: tuple[str, ...],
) -> ModelInterpretation:
    family, pixels = parse_custom_vision_preprocess(signature)
    if "Image.NominalPixelRange" in signature.metadata:
        # The metadata describe the input itself, independent of the first nodes.
        signature = replace(signature, input_ops=InputOps())
    exists = parse_custom_vision_manifest(signature) is not None
    return interpret(
        name,
        signature,
        picture,
        decoder,
        family,
        class_count=classes,
        needs_nms=isinstance(decoder, AnchorMapDecoder),
        evidence=(*(("cvexport.manifest lies beside it",) if exists else ()), *evidence, *pixels),
    )
