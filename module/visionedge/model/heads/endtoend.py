"""Detectors that output a finished list: box, score and class in each row, without overlaps.

YOLOv10 and YOLO26, and what Ultralytics exports with `nms=True`, give [N, n, 6]; YOLOv6 and v7 with their
suppression in the graph [n, 7], led by the picture's place in the batch; CenterNet [N, n, 6] again. So does
Ultralytics' RT-DETR, but with centres and sizes as parts of the picture.
"""

from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import convert_list_to_rows, find_strides, slice_axis, to_corners
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_picture_input,
)
from visionedge.model.labels import read_class_names
from visionedge.model.preprocessing import YOLO_INPUT, choose_preprocess, describe_exporter, is_detector

CENTERNET_INPUT = Preprocess("bgr", 1 / 255, (0.408, 0.447, 0.470), (0.289, 0.274, 0.278), pad=0)

_MAX_ROWS = 2000
_SELECTING_OPERATORS = frozenset({"NonMaxSuppression", "TopK"})
# Operators that find or compute boxes; a list whose first part comes from another one begins with other
# columns.
_BOX_OPERATORS = frozenset(
    {"Add", "Clip", "Div", "Gather", "GatherElements", "GatherND", "Mul", "Pad", "Slice", "Split", "Sub"}
)


@dataclass(frozen=True, slots=True)
class EndToEndDecoder(Decoder):
    """Decodes [N, n, 6]: box, score, class; or [n, 7] of one picture: its place, box, class, score.

    Boxes are corners in input pixels, or with `relative_to` (width, height) centres and sizes as parts of it.
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
            boxes = nodes.add("Mul", boxes, nodes.floats(*self.relative_to * 2))
            boxes = to_corners(
                nodes, slice_axis(nodes, boxes, 0, 2, axis=2), slice_axis(nodes, boxes, 2, 4, axis=2)
            )
        return convert_list_to_rows(nodes, boxes, scores, labels, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class DeepStream:
    """What exporters for NVIDIA's DeepStream write: corners, best score and its class of each cell."""

    name: str = "deepstream-yolo"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the last two columns are the maximum over the classes, and boxes have centres.

        Raises:
            ModelError: its boxes are not computed as in a YOLO, so its preprocessing is unknown.
        """
        found = _find_list(signature, 6, most_rows=None)
        if found is None or not _has_row_per_cell(signature, found[1]):
            return None
        picture, output = found
        count = (output.shape or (0, 0))[1] or 0
        if not any(find_strides(count, picture.width_px, picture.height_px, each) for each in (1, 3)):
            return None
        stated = "visionedge.input" in signature.metadata
        # The 4 x 4 that makes corners of centres and sizes; with an exponential they are YOLOX's.
        plain = "MatMul" in signature.operators and "Exp" not in signature.operators
        if not (plain or stated or describe_exporter(signature) or signature.input_ops.changes_values):
            raise ModelError(
                "gives a box, its best score and its class for each cell, as exports for DeepStream do, but"
                " not as a YOLO whose preparation is known; state input (color, scale, mean, std, fit) in"
                " MODEL.yaml beside it",
                state=("input: {color: rgb, scale: 0.00392156863, fit: letterbox}   # your model's own",),
            )
        interpretation = _interpret(self.name, signature, picture, output, YOLO_INPUT)
        if interpretation is None:
            return None
        clause = "each row is a cell with its best class, as exports for DeepStream are: boxes overlap"
        return replace(interpretation, needs_nms=True, evidence=(*interpretation.evidence, clause))


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """YOLOs that give [N, n, 6]: corners in input pixels, score, class."""

    name: str = "yolov10"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if nodes choose the rows, or its metadata says that it is one of Ultralytics."""
        found = _find_list(signature, 6)
        if found is None or _has_row_per_cell(signature, found[1]):
            return None
        picture, output = found
        output_ops = signature.output_ops[output.name]
        stated = signature.metadata.get("visionedge.head") == self.name
        chosen = bool({"TopK", "NonMaxSuppression"} & (output_ops.operators | signature.operators))
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
        stated = signature.metadata.get("visionedge.head") == self.name
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
            ModelError: nothing states how its pictures are prepared, which differs from export to export.
        """
        found = _find_list(signature, 6)
        if found is None:
            return None
        picture, output = found
        stated = signature.metadata.get("visionedge.head") == self.name
        if not stated and "MaxPool" not in signature.output_ops[output.name].operators:
            return None
        if "visionedge.input" not in signature.metadata:
            raise ModelError(
                "is a CenterNet, whose exports are prepared in different ways; state input (color, scale, "
                f"mean, std, fit) in MODEL.yaml beside it. Seen: {signature}",
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
    source = signature.output_sources.get(output.name)
    parts = source.parts if source is not None else ()
    return parts[-2:] == ("ReduceMax", "ArgMax") and not _SELECTING_OPERATORS & signature.operators


def _find_list(
    signature: ModelSignature, width: int, most_rows: int | None = _MAX_ROWS
) -> tuple[NetworkInput, TensorInfo] | None:
    """The picture and the one output with rows of this width: [N, n, 6], or [n, 7]."""
    picture = find_picture_input(signature)
    if picture is None or len(signature.inputs) != 1 or len(signature.outputs) != 1:
        return None
    (output,) = signature.outputs
    shape = output.shape
    if shape is None or output.name not in signature.output_ops or not output.dtype.startswith("float"):
        return None
    if len(shape) != (3 if width == 6 else 2) or shape[-1] != width:
        return None
    if width == 6 and most_rows is not None and (shape[1] or 0) > most_rows:
        return None
    return (picture, output) if is_detector(signature) else None


def _describe_columns(signature: ModelSignature, output: TensorInfo) -> str | None:
    """What the last two columns are, by their sources; None if the nodes do not show columns.

    Classes come from integers. Families that count them from 1 also have another preprocessing.
    """
    source = signature.output_sources.get(output.name)
    if source is None or len(source.part_is_integer) < 3:
        return None
    if source.part_is_integer[-2:] == (False, True):
        return "score, class" if source.part_offsets[-1] == 0 else "score, class from another number"
    return "class, score" if source.part_is_integer[-2:] == (True, False) else "something else"


def _samples_picture(signature: ModelSignature, output: TensorInfo) -> bool:
    """Whether queries sample the picture at positions that they refine: a DETR, whose boxes are relative."""
    refines = "Log" in signature.output_ops[output.name].operators
    return refines or "GridSample" in signature.operators


def _count_classes(signature: ModelSignature, output: TensorInfo) -> int | None:
    """The number of classes by its nodes or its names; 0 if unknown, None if they contradict each other."""
    names = read_class_names(signature.metadata)
    count = signature.output_ops[output.name].modulus or signature.classes.from_nms or 0
    if names is not None and count and len(names) != count:
        return None
    return count or (len(names) if names is not None else 0)


def _interpret(
    name: str,
    signature: ModelSignature,
    picture: NetworkInput,
    output: TensorInfo,
    family: Preprocess,
    *,
    relative: bool = False,
) -> ModelInterpretation | None:
    shape, size = output.shape or (), (picture.width_px, picture.height_px)
    count = shape[1] if len(shape) == 3 else None
    classes = _count_classes(signature, output)
    if classes is None:
        return None
    preprocess, preprocess_evidence = choose_preprocess(signature, picture, family)
    evidence = (
        *(("the head is stated",) if signature.metadata.get("visionedge.head") == name else ()),
        f"its output is a list of {count if count is not None else 'open length'}, {shape[-1]} numbers a row",
        f"{classes} classes are visible in it" if classes else "it does not show the number of classes",
        *describe_exporter(signature),
        *preprocess_evidence,
    )
    return ModelInterpretation(
        head=name,
        input=picture,
        preprocess=preprocess,
        decoder=EndToEndDecoder(output.name, count, shape[-1] or 0, size if relative else None),
        class_count=classes,
        needs_nms=False,
        evidence=evidence,
    )
