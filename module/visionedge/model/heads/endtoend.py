"""Detectors that output a finished list: box, score and class in each row, without overlaps.

YOLOv10, YOLO26, CenterNet and the exports of Ultralytics with `nms=True` output [N, n, 6], and so does
Ultralytics' RT-DETR, but with relative centres and sizes. YOLOv6 and v7 with suppression in the graph output
[n, 7], and a row begins with the index of the picture in the batch.
"""

from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import (
    centres_to_corners,
    convert_list_to_rows,
    find_strides,
    slice_axis,
    to_pixels,
)
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_only_input,
)
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import (
    YOLO_INPUT,
    describe_class_count,
    describe_exporter,
    interpret,
    is_detector,
)

CENTERNET_INPUT = Preprocess("bgr", 1 / 255, (0.408, 0.447, 0.470), (0.289, 0.274, 0.278), pad=0)

_MAX_ROWS = 2000
_SELECTING_OPERATORS = frozenset({"NonMaxSuppression", "TopK"})
# Operators that find or compute boxes. If another one computed the first part of a list, it is not a box.
_BOX_OPERATORS = frozenset(
    {"Add", "Clip", "Div", "Gather", "GatherElements", "GatherND", "Mul", "Pad", "Slice", "Split", "Sub"}
)


@dataclass(frozen=True, slots=True)
class EndToEndDecoder(Decoder):
    """Decodes [N, n, 6]: box, score, class; or [n, 7] of one picture: its index, box, class, score.

    Boxes are corners in input pixels; with `relative_to` (width, height), a centre and a size of 0-1.
    """

    output: str
    count: int | None
    width: int
    relative_to: tuple[int, int] | None = None

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        table = nodes.cast(self.output, "float32")
        first, score, label = 0, 4, 5
        if self.width == 7:
            table = nodes.reshape(table, 1, -1, 7)
            first, score, label = 1, 6, 5
        scores, labels = (
            nodes.reshape(slice_axis(nodes, table, column, column + 1, axis=2), 0, -1)
            for column in (score, label)
        )
        boxes = slice_axis(nodes, table, first, first + 4, axis=2)
        if self.relative_to is not None:
            boxes = centres_to_corners(nodes, to_pixels(nodes, boxes, *self.relative_to))
        return convert_list_to_rows(nodes, boxes, scores, labels, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class DeepStream:
    """YOLOs exported for NVIDIA's DeepStream: corners, best score and its class of each cell."""

    name: str = "deepstream-yolo"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the last two columns are the maximum over the classes and its index.

        Raises:
            ModelError: its boxes are not computed as in a YOLO, so its preprocessing is unknown.
        """
        found = _find_list(signature, 6, max_rows=None)
        if found is None or not _has_row_per_cell(signature, found[1]):
            return None
        picture, output = found
        size = picture.width_px, picture.height_px
        if not any(find_strides(output.side(1), *size, anchors) for anchors in (1, 3)):
            return None
        stated = "visionedge.input" in signature.metadata
        # A 4 x 4 matrix turns centres and sizes into corners; with an exponential it is a YOLOX.
        plain = "MatMul" in signature.operators and "Exp" not in signature.operators
        if not (plain or stated or describe_exporter(signature) or signature.input_ops.changes_values):
            raise ModelError(
                "outputs a box, its best score and its class for each cell, as exports for DeepStream do, but"
                " it is not a YOLO with a known preprocessing; state input (color, scale, mean, std, fit) in"
                " MODEL.yaml beside it",
                state=("input: {color: rgb, scale: 0.00392156863, fit: letterbox}   # your model's own",),
            )
        interpretation = _interpret(self.name, signature, picture, output, YOLO_INPUT)
        if interpretation is None:
            return None
        clause = "each row is a cell with its best class, as in exports for DeepStream: boxes overlap"
        return replace(interpretation, needs_nms=True, evidence=(*interpretation.evidence, clause))


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """YOLOs that output [N, n, 6]: corners in input pixels, score, class."""

    name: str = "yolov10"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if nodes choose the rows, or the metadata names Ultralytics."""
        found = _find_list(signature, 6)
        if found is None or _has_row_per_cell(signature, found[1]):
            return None
        picture, output = found
        output_ops = signature.ops(output)
        stated = signature.states_head(self.name)
        chosen = bool(_SELECTING_OPERATORS & (output_ops.operators | signature.operators))
        if not (stated or describe_exporter(signature) or chosen or not output_ops.has_weights):
            return None
        if _samples_picture(signature, output) and not stated:
            return None
        if _describe_columns(signature, output) not in ("score, class", None):
            return None
        if "MaxPool" in output_ops.operators or (
            len(output_ops.parts) > 1 and output_ops.parts[0] not in _BOX_OPERATORS
        ):
            return None
        return _interpret(self.name, signature, picture, output, YOLO_INPUT)


@dataclass(frozen=True, slots=True)
class RtDetrList:
    """RT-DETR as newer versions of Ultralytics export it: stretched, centres and sizes of 0-1."""

    name: str = "rtdetr-list"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if queries sample the picture and its metadata names Ultralytics."""
        found = _find_list(signature, 6)
        stated = signature.states_head(self.name)
        if found is None or not (
            stated or (_samples_picture(signature, found[1]) and describe_exporter(signature))
        ):
            return None
        return _interpret(self.name, signature, *found, replace(YOLO_INPUT, fit="stretch"), relative=True)


@dataclass(frozen=True, slots=True)
class CenterNet:
    """CenterNet: peaks of a heat map, found by a pooling; corners in input pixels, score, class."""

    name: str = "centernet"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if a pooling finds the rows.

        Raises:
            ModelError: its preprocessing, which differs from export to export, is not stated.
        """
        found = _find_list(signature, 6)
        if found is None:
            return None
        picture, output = found
        stated = signature.states_head(self.name)
        if not stated and "MaxPool" not in signature.ops(output).operators:
            return None
        if "visionedge.input" not in signature.metadata:
            raise ModelError(
                "is a CenterNet, whose exports differ in preprocessing; state input (color, scale, mean, std,"
                f" fit) in MODEL.yaml beside it. Seen: {signature}",
                state=(
                    "input: {color: bgr, scale: 0.00392156863, mean: [0.408, 0.447, 0.470],"
                    " std: [0.289, 0.274, 0.278], fit: letterbox}   # your model's",
                ),
            )
        return _interpret(self.name, signature, picture, output, CENTERNET_INPUT)


@dataclass(frozen=True, slots=True)
class YoloWithNms:
    """YOLOv6 and v7 exported with onnxruntime's suppression: [n, 7], one picture at a time."""

    name: str = "yolov7-nms"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the graph suppresses, and rows of seven numbers have the score last."""
        found = _find_list(signature, 7)
        if found is None or "NonMaxSuppression" not in signature.operators:
            return None
        picture, output = found
        if picture.batch not in (None, 1) or _describe_columns(signature, output) != "class, score":
            return None
        return _interpret(self.name, signature, replace(picture, batch=1), output, YOLO_INPUT)


HEADS = (DeepStream(), EndToEnd(), RtDetrList(), CenterNet(), YoloWithNms())


def _has_row_per_cell(signature: ModelSignature, output: TensorInfo) -> bool:
    """Whether the last columns are the best score and its class, and no node chooses rows."""
    last = signature.source(output).parts[-2:]
    return last == ("ReduceMax", "ArgMax") and not _SELECTING_OPERATORS & signature.operators


def _find_list(
    signature: ModelSignature, width: int, max_rows: int | None = _MAX_ROWS
) -> tuple[NetworkInput, TensorInfo] | None:
    """The picture and the one output with rows of this width: [N, n, 6], or [n, 7]."""
    picture = find_only_input(signature)
    if picture is None or len(signature.outputs) != 1:
        return None
    (output,) = signature.outputs
    if output.name not in signature.output_ops or not output.is_float:
        return None
    if output.rank != (3 if width == 6 else 2) or output.side(-1) != width:
        return None
    if width == 6 and max_rows is not None and (output.side(1) or 0) > max_rows:
        return None
    return (picture, output) if is_detector(signature) else None


def _describe_columns(signature: ModelSignature, output: TensorInfo) -> str | None:
    """What the last two columns are, by their sources; None if the nodes do not show columns.

    Classes come from integers. Families that count them from 1 also have another preprocessing.
    """
    source = signature.source(output)
    if len(source.part_is_integer) < 3:
        return None
    if source.part_is_integer[-2:] == (False, True):
        return "score, class" if source.part_offsets[-1] == 0 else "score, class from another number"
    return "class, score" if source.part_is_integer[-2:] == (True, False) else "something else"


def _samples_picture(signature: ModelSignature, output: TensorInfo) -> bool:
    """Whether queries sample the picture at positions that they refine: a DETR, whose boxes are relative."""
    return "Log" in signature.ops(output).operators or "GridSample" in signature.operators


def _interpret(
    name: str,
    signature: ModelSignature,
    picture: NetworkInput,
    output: TensorInfo,
    family: Preprocess,
    *,
    relative: bool = False,
) -> ModelInterpretation | None:
    named = count_class_names(signature.metadata)
    shown = signature.ops(output).modulus or signature.classes.from_nms or 0
    if named and shown and named != shown:
        return None
    count = output.side(1) if output.rank == 3 else None
    size = (picture.width_px, picture.height_px) if relative else None
    return interpret(
        name,
        signature,
        picture,
        EndToEndDecoder(output.name, count, output.side(-1) or 0, size),
        family,
        class_count=shown or named,
        needs_nms=False,
        evidence=(
            f"its output is a list of {'open length' if count is None else count},"
            f" {output.side(-1)} numbers a row",
            describe_class_count(shown or named),
            *describe_exporter(signature),
        ),
    )
