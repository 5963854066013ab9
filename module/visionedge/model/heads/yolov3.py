"""YOLOv3, v4 and v5/v7 without their last nodes: one raw map per scale; the anchors must be stated."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, Shape
from visionedge.model.decoding import AnchorMap, AnchorMapDecoder, AnchorMapOrder, compute_grid
from visionedge.model.interpretation import ModelInterpretation, NetworkInput, Preprocess, find_only_input
from visionedge.model.preprocessing import YOLO_INPUT, interpret, is_detector

DARKNET_INPUT = replace(YOLO_INPUT, pad=128)

_STRIDES_PX = (4, 8, 16, 32, 64)
# YOLOv4's scale_x_y by the stride of the map.
_V4_SCALE_X_Y = {8: 1.2, 16: 1.1, 32: 1.05}
# YOLOv4-tiny has the anchors of YOLOv3-tiny, but assigns others of them to its finer map.
_TINY_ANCHORS = (10, 14, 23, 27, 37, 58, 81, 82, 135, 169, 344, 319)

AnchorSizes = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class MatchedMaps:
    """Maps that fit together: their names and strides, finest first, and the order of their numbers."""

    picture: NetworkInput
    names: tuple[str, ...]
    strides_px: tuple[int, ...]
    order: AnchorMapOrder
    width: int
    anchors_per_cell: int | None


@dataclass(frozen=True, slots=True)
class RawYolo:
    """One way to decode raw maps. The activations of a network show which one is right, or it is stated."""

    name: str
    size: Literal["exp", "square"]
    family: Preprocess
    scale_x_y: Mapping[int, float]

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if all outputs are raw maps of one width at different strides.

        Raises:
            ModelError: their anchors are not stated, or do not fit these maps.
        """
        found = _find_maps(signature)
        stated = signature.states_head(self.name)
        if found is None or not (stated or _find_head_name(signature, found) == self.name):
            return None
        anchors = _read_anchors(signature, found)
        classes = found.width // (1 if found.anchors_per_cell else len(anchors[0])) - 5
        if classes < 1 or not is_detector(signature, classes):
            return None
        strides = ", ".join(map(str, found.strides_px))
        return interpret(
            self.name,
            signature,
            found.picture,
            AnchorMapDecoder(self._maps(found, anchors), classes, found.order, size=self.size),
            self.family,
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"raw maps of {len(anchors[0])} anchors and {classes} classes at strides {strides}",
                "anchors as stated",
            ),
        )

    def _maps(self, found: MatchedMaps, anchors: tuple[AnchorSizes, ...]) -> tuple[AnchorMap, ...]:
        picture, farthest = found.picture, max(self.scale_x_y.values())
        return tuple(
            AnchorMap(
                name,
                *compute_grid(picture.width_px, picture.height_px, stride),
                stride,
                stride,
                pairs,
                self.scale_x_y.get(stride, farthest),
            )
            for name, stride, pairs in zip(found.names, found.strides_px, anchors, strict=True)
        )


HEADS = (
    RawYolo("yolov3", "exp", DARKNET_INPUT, {8: 1.0}),
    RawYolo("yolov4", "exp", DARKNET_INPUT, _V4_SCALE_X_Y),
    RawYolo("yolov5-raw", "square", YOLO_INPUT, {8: 2.0}),
)


def _find_head_name(signature: ModelSignature, found: MatchedMaps) -> str | None:
    """The head by the activations of the network; None if they do not show it."""
    used = signature.operators
    if used & {"Mish", "Softplus"}:
        return "yolov4"
    if "LeakyRelu" in used:  # YOLOv7-tiny has it too, and anchors first
        return None if found.order == "anchors-first" else "yolov3"
    if used & {"Sigmoid", "HardSwish", "HardSigmoid", "Swish"}:
        return "yolov5-raw" if found.order == "anchors-first" else None
    return "yolov3" if found.anchors_per_cell is None else None


def _find_maps(signature: ModelSignature) -> MatchedMaps | None:
    """All outputs as maps of different strides; None if they are not, or if nodes decode them."""
    picture = find_only_input(signature)
    if picture is None or not 2 <= len(signature.outputs) <= 5:
        return None
    for output_ops in map(signature.ops, signature.outputs):
        if "Sigmoid" in output_ops.operators or (output_ops.has_weights and output_ops.parts != ("Conv",)):
            return None
    orders: tuple[AnchorMapOrder, ...] = ("channels-first", "channels-last", "anchors-first")
    ways = [way for order in orders if (way := _match_order(signature, picture, order)) is not None]
    return ways[0] if len(ways) == 1 else None


def _match_order(
    signature: ModelSignature, picture: NetworkInput, order: AnchorMapOrder
) -> MatchedMaps | None:
    """The maps, if their numbers can have this order."""
    found: dict[int, str] = {}
    widths = set()
    for tensor in signature.outputs:
        taken = _read_shape(tensor.shape, order)
        if taken is None:
            return None
        rows, columns, anchors_per_cell, width = taken
        strides = [
            s for s in _STRIDES_PX if compute_grid(picture.width_px, picture.height_px, s) == (columns, rows)
        ]
        if len(strides) != 1 or strides[0] in found:
            return None
        found[strides[0]] = tensor.name
        widths.add((anchors_per_cell, width))
    if len(widths) != 1:
        return None
    anchors_per_cell, width = widths.pop()
    strides_px = tuple(sorted(found))
    return MatchedMaps(
        picture, tuple(found[s] for s in strides_px), strides_px, order, width, anchors_per_cell
    )


def _read_shape(shape: Shape | None, order: AnchorMapOrder) -> tuple[int, int, int | None, int] | None:
    """(rows, columns, anchors, width) of a map; anchors None if they are part of the width."""
    if shape is None or None in shape[1:]:
        return None
    sides = [side or 0 for side in shape[1:]]
    if len(sides) == 3 and order != "anchors-first":
        width, rows, columns = sides if order == "channels-first" else (sides[2], sides[0], sides[1])
        return rows, columns, None, width
    if len(sides) == 4 and order != "channels-first":
        if order == "anchors-first":
            anchors_per_cell, rows, columns, width = sides
        else:
            rows, columns, anchors_per_cell, width = sides
        return (rows, columns, anchors_per_cell, width) if 1 <= anchors_per_cell <= 9 and width >= 6 else None
    return None


def _read_anchors(signature: ModelSignature, found: MatchedMaps) -> tuple[AnchorSizes, ...]:
    """The anchors of each map, finest first, in input pixels.

    Raises:
        ModelError: they are not stated, or do not fit the maps.
    """
    text = signature.metadata.get("anchors")
    if text is None:
        raise ModelError(
            "outputs raw maps, as YOLOv3, v4 and v5 do, but their anchors are not stated; put"
            f" 'anchors: [[width, height], …]' in input pixels into MODEL.yaml beside it. Seen: {signature}",
            state=("anchors: [[10, 13], [16, 30], [33, 23]]   # widths and heights in pixels of its input",),
        )
    document, flat = _parse_numbers(text)
    pairs = tuple(zip(flat[::2], flat[1::2], strict=False))
    scales = len(found.strides_px)
    anchors_per_cell = len(pairs) // scales
    right = (
        len(flat) == 2 * anchors_per_cell * scales
        and min(flat, default=0) > 0
        and all(map(math.isfinite, flat))
    )
    if (
        not right
        or found.anchors_per_cell not in (None, anchors_per_cell)
        or (found.anchors_per_cell is None and found.width % anchors_per_cell)
    ):
        raise ModelError(f"states {len(pairs)} anchors, which cannot be divided among its {scales} maps")
    if max(flat) <= max(found.picture.width_px, found.picture.height_px) / found.strides_px[-1]:
        raise ModelError("states anchors that fit into its coarsest map; they must be in pixels of its input")
    if (
        flat == _TINY_ANCHORS
        and not _is_list_per_map(document, scales)
        and signature.operators & {"Split", "Slice"}
    ):
        raise ModelError(
            "states the six anchors of YOLO-tiny, of which v4 uses some twice; state a list for each map"
        )
    groups = [pairs[start : start + anchors_per_cell] for start in range(0, len(pairs), anchors_per_cell)]
    return tuple(sorted(groups, key=lambda group: sum(width * height for width, height in group)))


def _parse_numbers(text: str) -> tuple[Sequence[Any], tuple[float, ...]]:
    """A list of numbers, as it is written and flattened."""
    try:
        document = json.loads(text)
        return document, tuple(float(number) for number in _flatten(document))
    except (ValueError, TypeError):
        raise ModelError("its metadata 'anchors' is not a list of widths and heights") from None


def _is_list_per_map(document: Sequence[Any], scales: int) -> bool:
    """Whether the anchors are given as one list for each map."""
    return len(document) == scales and all(isinstance(group, list) for group in document)


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [number for inner in value for number in _flatten(inner)]
    return [value]
