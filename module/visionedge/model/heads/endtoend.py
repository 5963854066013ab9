"""Detectors that end in a list of their own: box, score and class in each row, nothing left to suppress.

YOLOv10 and YOLO26, and what Ultralytics exports with `nms=True`, give [N, n, 6]; YOLOv6 and v7 with their
suppression in the graph [n, 7], led by the picture's place in the batch; CenterNet [N, n, 6] again. So does
Ultralytics' RT-DETR, but with centres and sizes as parts of the picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import Signature, Tensor
from visionedge.model.decoding import listed_rows, part, pyramid, to_corners
from visionedge.model.graph import Nodes
from visionedge.model.interpretation import NetworkInput, Preprocess, Reading, picture_input
from visionedge.model.labels import class_names
from visionedge.model.preprocessing import YOLO_INPUT, detects, origin, prepared

CENTERNET_INPUT = Preprocess("bgr", 1 / 255, (0.408, 0.447, 0.470), (0.289, 0.274, 0.278), pad=0)

_MOST_ROWS = 2000
_CHOOSERS = frozenset({"NonMaxSuppression", "TopK"})
# What finds or computes boxes; a list whose first part is something else has other columns in front.
_BOX_MAKERS = frozenset(
    {"Add", "Clip", "Div", "Gather", "GatherElements", "GatherND", "Mul", "Pad", "Slice", "Split", "Sub"}
)


@dataclass(frozen=True, slots=True)
class ListDecoder:
    """Decodes [N, n, 6]: box, score, class; or [n, 7] of one picture: its place, box, class, score.

    Boxes are corners in input pixels, or with `relative_to` (width, height) centres and sizes as parts of it.
    """

    output: str
    count: int | None
    width: int
    relative_to: tuple[int, int] | None = None

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The list, by falling score."""
        table = nodes.cast(self.output, "float32")
        first, score, label = 0, 4, 5
        if self.width == 7:
            table = nodes.reshape(table, 1, -1, 7)
            first, score, label = 1, 6, 5
        scores, labels = (
            nodes.reshape(part(nodes, table, column, column + 1, axis=2), 0, -1) for column in (score, label)
        )
        boxes = part(nodes, table, first, first + 4, axis=2)
        if self.relative_to is not None:
            boxes = nodes.add("Mul", boxes, nodes.floats(*self.relative_to * 2))
            boxes = to_corners(nodes, part(nodes, boxes, 0, 2, axis=2), part(nodes, boxes, 2, 4, axis=2))
        return listed_rows(nodes, boxes, scores, labels, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class DeepStream:
    """What exporters for NVIDIA's DeepStream write: corners, best score and its class of each cell."""

    name: str = "deepstream-yolo"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where a maximum over the classes made the last two columns and boxes came from centres.

        Raises:
            ModelError: its boxes are not made as the YOLOs' are, so its pictures may be prepared otherwise.
        """
        found = _list_of(signature, 6, most_rows=None)
        if found is None or not _per_cell(signature, found[1]):
            return None
        picture, output = found
        count = (output.shape or (0, 0))[1] or 0
        if not any(pyramid(count, picture.width_px, picture.height_px, each) for each in (1, 3)):
            return None
        stated = "visionedge.input" in signature.metadata
        # The 4 x 4 that makes corners of centres and sizes; with an exponential they are YOLOX's.
        plain = "MatMul" in signature.operators and "Exp" not in signature.operators
        if not (plain or stated or origin(signature) or signature.opening.scales):
            raise ModelError(
                "gives a box, its best score and its class for each cell, as exports for DeepStream do, but"
                " not as a YOLO whose preparation is known; state input (color, scale, mean, std, fit) in"
                " MODEL.yaml beside it",
                state=("input: {color: rgb, scale: 0.00392156863, fit: letterbox}   # your model's own",),
            )
        reading = _reading(self.name, signature, picture, output, YOLO_INPUT)
        if reading is None:
            return None
        clause = "each row is a cell with its best class, as exports for DeepStream are: boxes overlap"
        return replace(reading, suppress=True, evidence=(*reading.evidence, clause))


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """YOLOs that give [N, n, 6]: corners in input pixels, score, class."""

    name: str = "yolov10"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where nodes choose the rows, or its metadata says that it is one of Ultralytics."""
        found = _list_of(signature, 6)
        if found is None or _per_cell(signature, found[1]):
            return None
        picture, output = found
        closing = signature.closings[output.name]
        stated = signature.metadata.get("visionedge.head") == self.name
        chosen = bool({"TopK", "NonMaxSuppression"} & (closing.operators | signature.operators))
        if not (stated or origin(signature) or chosen or not closing.weighted):
            return None
        if _samples(signature, output) and not stated:
            return None
        if _columns(signature, output) not in ("score, class", None):
            return None
        if "MaxPool" in closing.operators or (len(closing.parts) > 1 and closing.parts[0] not in _BOX_MAKERS):
            return None
        return _reading(self.name, signature, picture, output, YOLO_INPUT)


@dataclass(frozen=True, slots=True)
class RtDetrList:
    """RT-DETR as newer versions of Ultralytics export it: stretched, centres and sizes of 0-1."""

    name: str = "rtdetr-list"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where queries sample the picture and its metadata says that it is one of Ultralytics."""
        found = _list_of(signature, 6)
        stated = signature.metadata.get("visionedge.head") == self.name
        if found is None or not (stated or (_samples(signature, found[1]) and origin(signature))):
            return None
        return _reading(self.name, signature, *found, replace(YOLO_INPUT, fit="stretch"), relative=True)


@dataclass(frozen=True, slots=True)
class CenterNet:
    """CenterNet: peaks of a heat map, found by a pooling; corners in input pixels, score, class."""

    name: str = "centernet"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where a pooling finds the rows.

        Raises:
            ModelError: nothing states how its pictures are prepared, which differs from export to export.
        """
        found = _list_of(signature, 6)
        if found is None:
            return None
        picture, output = found
        stated = signature.metadata.get("visionedge.head") == self.name
        if not stated and "MaxPool" not in signature.closings[output.name].operators:
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
        return _reading(self.name, signature, picture, output, CENTERNET_INPUT)


@dataclass(frozen=True, slots=True)
class YoloWithSuppression:
    """YOLOv6 and v7 exported with onnxruntime's suppression: [n, 7], one picture at a time."""

    name: str = "yolov7-nms"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where the graph suppresses and rows have seven numbers, the score behind the class."""
        found = _list_of(signature, 7)
        if found is None or "NonMaxSuppression" not in signature.operators:
            return None
        picture, output = found
        if picture.batch not in (None, 1) or _columns(signature, output) != "class, score":
            return None
        return _reading(self.name, signature, replace(picture, batch=1), output, YOLO_INPUT)


HEADS = (DeepStream(), EndToEnd(), RtDetrList(), CenterNet(), YoloWithSuppression())


def _per_cell(signature: Signature, output: Tensor) -> bool:
    """Whether the last columns are the maximum over the classes and where it stood, of rows nobody chose."""
    origin = signature.origins.get(output.name)
    parts = origin.parts if origin is not None else ()
    return parts[-2:] == ("ReduceMax", "ArgMax") and not _CHOOSERS & signature.operators


def _list_of(
    signature: Signature, width: int, most_rows: int | None = _MOST_ROWS
) -> tuple[NetworkInput, Tensor] | None:
    """The picture and the one output with rows of this width: [N, n, 6], or [n, 7]."""
    picture = picture_input(signature)
    if picture is None or len(signature.inputs) != 1 or len(signature.outputs) != 1:
        return None
    (output,) = signature.outputs
    shape = output.shape
    if shape is None or output.name not in signature.closings or not output.dtype.startswith("float"):
        return None
    if len(shape) != (3 if width == 6 else 2) or shape[-1] != width:
        return None
    if width == 6 and most_rows is not None and (shape[1] or 0) > most_rows:
        return None
    return (picture, output) if detects(signature) else None


def _columns(signature: Signature, output: Tensor) -> str | None:
    """What the last two columns are, by where they come from; None where nodes do not show columns.

    Classes come from whole numbers. From 1 they are counted by other families, whose pictures are prepared
    otherwise as well.
    """
    origin = signature.origins.get(output.name)
    if origin is None or len(origin.wholes) < 3:
        return None
    if origin.wholes[-2:] == (False, True):
        return "score, class" if origin.added[-1] == 0 else "score, class from another number"
    return "class, score" if origin.wholes[-2:] == (True, False) else "something else"


def _samples(signature: Signature, output: Tensor) -> bool:
    """Whether queries sample the picture at places that they refine: a DETR, whose boxes are parts of it."""
    refines = "Log" in signature.closings[output.name].operators
    return refines or "GridSample" in signature.operators


def _class_count(signature: Signature, output: Tensor) -> int | None:
    """How many classes its nodes or its names tell, 0 if none do; None where they contradict each other."""
    names = class_names(signature.metadata)
    told = signature.closings[output.name].modulus or signature.classes.suppressed or 0
    if names is not None and told and len(names) != told:
        return None
    return told or (len(names) if names is not None else 0)


def _reading(
    name: str,
    signature: Signature,
    picture: NetworkInput,
    output: Tensor,
    family: Preprocess,
    *,
    relative: bool = False,
) -> Reading | None:
    shape, size = output.shape or (), (picture.width_px, picture.height_px)
    count = shape[1] if len(shape) == 3 else None
    classes = _class_count(signature, output)
    if classes is None:
        return None
    way, ways = prepared(signature, picture, family)
    evidence = (
        *(("its metadata states the head",) if signature.metadata.get("visionedge.head") == name else ()),
        f"its output is a list of {count if count is not None else 'open length'}, {shape[-1]} numbers a row",
        f"{classes} classes are seen in it" if classes else "nothing in it tells the number of classes",
        *origin(signature),
        *ways,
    )
    return Reading(
        head=name,
        input=picture,
        preprocess=way,
        decoder=ListDecoder(output.name, count, shape[-1] or 0, size if relative else None),
        class_count=classes,
        suppress=False,
        evidence=evidence,
    )
