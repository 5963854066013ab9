"""Finished lists of boxes, classes and scores from PyTorch: torchvision, Azure AutoML, detectron2, MMDeploy.

Their graphs choose and suppress boxes, which are in input pixels. In torchvision and AutoML class 0 is a
background, in detectron2 and MMDetection it is not. The graphs of torchvision and detectron2 subtract a mean;
for the others the mean is subtracted before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.input_ops import InputOps
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import convert_list_to_rows, slice_axis
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    MEAN_EXAMPLE,
    Decoder,
    ModelInterpretation,
    Preprocess,
    find_only_input,
    read_metadata_object,
)
from visionedge.model.labels import AUTOML_BACKGROUND, count_class_names, read_class_names
from visionedge.model.preprocessing import interpret

# These models resize a picture of any shape themselves, so a letterbox keeps its aspect ratio.
RGB_INPUT = Preprocess("rgb", 1 / 255, fit="letterbox", anchor="top-left")
BGR_INPUT = Preprocess("bgr", 1.0, fit="letterbox", anchor="top-left")
AUTOML_INPUT = Preprocess("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "stretch")

_TRANSFORM_OPERATORS = frozenset({"Pad", "Resize"})
_MIN_LARGE_FACTOR = 50  # a larger factor turns pixels of 0-1 into 0-255
_AUTOML_REASON = f"labels.json beside it begins with {AUTOML_BACKGROUND}, as Azure AutoML writes it"


@dataclass(frozen=True, slots=True)
class FinishedListDecoder(Decoder):
    """Decodes boxes [N, n, 4], corners in input pixels, classes and scores [N, n] or [N, n, 1].

    If `scores` is "", the scores are the fifth column of the boxes. `count` is n, if known.
    """

    boxes: str
    classes: str
    scores: str
    count: int | None

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        table = nodes.cast(self.boxes, "float32")
        if self.scores:
            boxes = nodes.reshape(table, 1, -1, 4)
            scores = nodes.cast(self.scores, "float32")
        else:
            table = nodes.reshape(table, 1, -1, 5)
            boxes, scores = slice_axis(nodes, table, 0, 4, 2), slice_axis(nodes, table, 4, 5, 2)
        ids = nodes.cast(self.classes, "float32")
        return convert_list_to_rows(
            nodes,
            boxes,
            nodes.reshape(scores, 1, -1),
            nodes.reshape(ids, 1, -1),
            count=self.count,
            limit=limit,
        )


Outputs = tuple[TensorInfo, TensorInfo, TensorInfo | None]
"""Boxes, classes and scores; None if the scores are a column of the boxes."""


@dataclass(frozen=True, slots=True)
class FinishedListHead:
    """A family of such lists. `find` returns the outputs of a model of the family, and None for any other."""

    name: str
    find: Callable[[ModelSignature], Outputs | None]
    family: Preprocess
    reason: str
    background: bool = False

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the outputs are such a list for one picture.

        Raises:
            ModelError: it is unknown how its pictures are prepared.
        """
        picture, found = find_only_input(signature), self.find(signature)
        if picture is None or found is None or picture.batch not in (None, 1):
            return None
        family, reason = self.family, self.reason
        if self.background and _is_automl(signature):
            family, reason = AUTOML_INPUT, _AUTOML_REASON
        else:
            _check_normalises(signature)
        boxes, classes, scores = found
        count = count_class_names(signature.metadata)
        clauses = ["a finished list: boxes in pixels, integer classes and scores", reason]
        if self.background:
            count = signature.classes.from_classifier or 0
            clauses.append("class 0 is the background, as in torchvision and AutoML")
        return interpret(
            self.name,
            _before_transform(signature),
            replace(picture, batch=1),
            FinishedListDecoder(boxes.name, classes.name, scores.name if scores else "", boxes.side(-2)),
            _with_color_of_mean(signature, family),
            class_count=count,
            needs_nms=False,
            evidence=clauses,
            background=self.background,
        )


def _find_torchvision(signature: ModelSignature) -> Outputs | None:
    # Custom Vision's lists have the same shapes, but PyTorch did not write them.
    is_pytorch = signature.producer == "pytorch" or signature.states_head("torchvision")
    return _find_outputs(signature.outputs) if is_pytorch else None


def _find_detectron2(signature: ModelSignature) -> Outputs | None:
    """Three outputs as in torchvision, and a fourth with the size of the picture, two integers."""
    sizes = [t for t in signature.outputs if t.side(-1) == 2 and t.is_integer]
    return _find_outputs([t for t in signature.outputs if t not in sizes]) if len(sizes) == 1 else None


def _find_mmdeploy(signature: ModelSignature) -> Outputs | None:
    """Float boxes [N, n, 5], with the score as the fifth column, and integer classes [N, n]."""
    boxes = [t for t in signature.outputs if t.side(-1) == 5 and t.is_float]
    classes = [t for t in signature.outputs if t.is_integer and t.rank in (1, 2)]
    if len(signature.outputs) != 2 or not len(boxes) == len(classes) == 1:
        return None
    return boxes[0], classes[0], None


HEADS = (
    # Faster R-CNN, RetinaNet, SSD and FCOS of torchvision, and those that Azure AutoML makes of them.
    FinishedListHead(
        "torchvision",
        _find_torchvision,
        RGB_INPUT,
        "its first nodes subtract a mean, as torchvision's do",
        background=True,
    ),
    FinishedListHead(
        "detectron2", _find_detectron2, BGR_INPUT, "its first nodes subtract a mean, as detectron2's do"
    ),
    FinishedListHead(
        "mmdeploy",
        _find_mmdeploy,
        RGB_INPUT,
        "boxes with their scores, and classes in a second output, as MMDeploy writes them",
    ),
)


def _find_outputs(outputs: Sequence[TensorInfo]) -> Outputs | None:
    """Float boxes [.., n, 4], integer classes [.., n] and float scores [.., n]; names are ignored."""
    boxes = [t for t in outputs if t.side(-1) == 4 and t.rank in (2, 3)]
    rest = [t for t in outputs if t not in boxes and t.rank in (1, 2)]
    classes, scores = [t for t in rest if t.is_integer], [t for t in rest if t.is_float]
    if len(outputs) != 3 or not len(boxes) == len(classes) == len(scores) == 1 or not boxes[0].is_float:
        return None
    return boxes[0], classes[0], scores[0]


def _is_automl(signature: ModelSignature) -> bool:
    names = read_class_names(signature.metadata) or ()
    return names[:1] == (AUTOML_BACKGROUND,) and not signature.input_ops.known_transform


def _check_normalises(signature: ModelSignature) -> None:
    """Check that the graph prepares its pictures, or that their preparation is stated.

    Raises:
        ModelError: neither is so.
    """
    stated = read_metadata_object(signature, "visionedge.input")
    if (
        {"scale", "mean"} & set(stated)
        or signature.input_ops.changes_values
        or signature.input_ops.known_transform
    ):
        return
    raise ModelError(
        "outputs a finished list of boxes, classes and scores, but no node subtracts a mean, so how its"
        " pictures are prepared is unknown; for a model of Azure AutoML put its labels.json beside it, else"
        " state input.scale, input.mean and input.std in MODEL.yaml",
        state=MEAN_EXAMPLE,
    )


def _before_transform(signature: ModelSignature) -> ModelSignature:
    """The signature with the operations on the picture before the graph resizes and pads it.

    The graph scales its boxes back itself, so only colour and scaling matter here.
    """
    input_ops = signature.input_ops
    if input_ops.known_transform is None or not set(input_ops.unknown.split(", ")) <= _TRANSFORM_OPERATORS:
        return signature
    factor, offset, swaps_red_blue, _ = input_ops.known_transform
    if max(factor) > _MIN_LARGE_FACTOR:  # pixels of 0-1 become 0-255, by a deviation of 1/255
        factor, offset = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    return replace(
        signature, input_ops=InputOps(factor, offset, swaps_red_blue, input_ops.kernels, "", input_ops.seen)
    )


def _with_color_of_mean(signature: ModelSignature, family: Preprocess) -> Preprocess:
    """The family with the colour order of the mean that the graph subtracts; ImageNet's largest is red."""
    input_ops = signature.input_ops
    factor, offset, *_ = input_ops.known_transform or (input_ops.factor, input_ops.offset)
    means = [abs(low / each) for low, each in zip(offset, factor, strict=True)]
    if len(set(means)) < 3:
        return family
    return replace(family, color="rgb" if means[0] > means[2] else "bgr")
