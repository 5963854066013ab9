"""Finished lists of boxes, classes and scores from PyTorch: torchvision, Azure AutoML, detectron2, MMDeploy.

Their graphs choose and suppress boxes, which are in input pixels. They differ in class 0 and in
preprocessing: torchvision and AutoML have a background as class 0, detectron2 and MMDetection have none;
torchvision and detectron2 subtract a mean in the graph, the others in front of it.
"""

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
    NetworkInput,
    Preprocess,
    find_picture_input,
    read_metadata_object,
)
from visionedge.model.labels import AUTOML_BACKGROUND, read_class_names
from visionedge.model.preprocessing import choose_preprocess

# These models resize a picture of any shape themselves, so a letterbox keeps its aspect ratio.
RGB_INPUT = Preprocess("rgb", 1 / 255, fit="letterbox", anchor="top-left")
BGR_INPUT = Preprocess("bgr", 1.0, fit="letterbox", anchor="top-left")
AUTOML_INPUT = Preprocess("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "stretch")

_TRANSFORM_OPERATORS = frozenset({"Pad", "Resize"})
_MIN_LARGE_FACTOR = 50  # of pixels of 0-1: brought to 0-255


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


@dataclass(frozen=True, slots=True)
class Torchvision:
    """Faster R-CNN, RetinaNet, SSD and FCOS of torchvision, and those that Azure AutoML makes of them."""

    name: str = "torchvision"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the outputs are boxes, integer classes and scores.

        Raises:
            ModelError: it is unknown how its pictures are prepared.
        """
        picture = find_picture_input(signature)
        found = _find_outputs(signature)
        if picture is None or found is None or picture.batch not in (None, 1):
            return None
        stated = signature.metadata.get("visionedge.head") == self.name
        if not stated and signature.producer != "pytorch":
            return None  # Custom Vision's lists have the same shapes
        boxes, classes, scores = found
        names = read_class_names(signature.metadata) or ()
        automl = names[:1] == (AUTOML_BACKGROUND,) and not signature.input_ops.known_transform
        family = AUTOML_INPUT if automl else RGB_INPUT
        reason = (
            f"labels.json beside it begins with {AUTOML_BACKGROUND}, as Azure AutoML writes it"
            if automl
            else "its first nodes subtract a mean, as torchvision's do"
        )
        if not automl:
            _check_normalises(signature)
        decoder = FinishedListDecoder(boxes.name, classes.name, scores.name, _read_count(boxes))
        interpretation = _interpret(signature, picture, decoder, family, (self.name, reason))
        clause = "class 0 is the background, as torchvision and AutoML have it"
        count = signature.classes.from_classifier or 0
        return replace(
            interpretation, class_count=count, background=True, evidence=(*interpretation.evidence, clause)
        )


@dataclass(frozen=True, slots=True)
class Detectron2:
    """detectron2's tracing export: boxes, classes, scores and the size of the picture; BGR of 0-255."""

    name: str = "detectron2"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there is a fourth output of two integers.

        Raises:
            ModelError: it is unknown how its pictures are prepared.
        """
        picture = find_picture_input(signature)
        sizes = [t for t in signature.outputs if (t.shape or ())[-1:] == (2,) and t.dtype.startswith("int")]
        rest = tuple(t for t in signature.outputs if t not in sizes)
        found = _find_outputs(replace(signature, outputs=rest)) if len(sizes) == 1 else None
        if picture is None or found is None or picture.batch not in (None, 1):
            return None
        _check_normalises(signature)
        boxes, classes, scores = found
        decoder = FinishedListDecoder(boxes.name, classes.name, scores.name, _read_count(boxes))
        reason = "its first nodes subtract a mean, as detectron2's do"
        return _interpret(signature, picture, decoder, BGR_INPUT, (self.name, reason))


@dataclass(frozen=True, slots=True)
class MmDeploy:
    """MMDetection's models as MMDeploy exports them: boxes with their score, and classes from 0."""

    name: str = "mmdeploy"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the two outputs are float [N, n, 5] and integer [N, n].

        Raises:
            ModelError: it is unknown how its pictures are prepared.
        """
        picture = find_picture_input(signature)
        if picture is None or len(signature.inputs) != 1 or len(signature.outputs) != 2:
            return None
        boxes = [t for t in signature.outputs if (t.shape or ())[-1:] == (5,) and t.dtype.startswith("float")]
        classes = [t for t in signature.outputs if t.dtype.startswith("int") and len(t.shape or ()) in (1, 2)]
        if len(boxes) != 1 or len(classes) != 1 or picture.batch not in (None, 1):
            return None
        _check_normalises(signature)
        decoder = FinishedListDecoder(boxes[0].name, classes[0].name, "", _read_count(boxes[0]))
        reason = "boxes with their score and classes apart, as MMDeploy writes them"
        return _interpret(signature, picture, decoder, RGB_INPUT, (self.name, reason))


HEADS = (Torchvision(), Detectron2(), MmDeploy())


def _find_outputs(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo, TensorInfo] | None:
    """(boxes, classes, scores): float [.., n, 4], whole [.., n], float [.., n], whatever they are called."""
    if len(signature.inputs) != 1 or len(signature.outputs) != 3:
        return None
    boxes = [t for t in signature.outputs if len(t.shape or ()) in (2, 3) and (t.shape or ())[-1] == 4]
    rest = [t for t in signature.outputs if t not in boxes and len(t.shape or ()) in (1, 2)]
    classes = [t for t in rest if t.dtype in ("int64", "int32")]
    scores = [t for t in rest if t.dtype.startswith("float")]
    if not len(boxes) == len(classes) == len(scores) == 1 or not boxes[0].dtype.startswith("float"):
        return None
    return boxes[0], classes[0], scores[0]


def _read_count(boxes: TensorInfo) -> int | None:
    return (boxes.shape or (None, None))[-2]


def _check_normalises(signature: ModelSignature) -> None:
    """Pictures are prepared in the graph, or it is stated how they are.

    Raises:
        ModelError: neither.
    """
    stated = read_metadata_object(signature, "visionedge.input")
    if (
        {"scale", "mean"} & set(stated)
        or signature.input_ops.changes_values
        or signature.input_ops.known_transform
    ):
        return
    raise ModelError(
        "gives a finished list of boxes, classes and scores, but nothing in it subtracts a mean, so how its"
        " pictures are prepared is not known; for Azure AutoML put its labels.json beside it, else state"
        " input.scale, input.mean and input.std in MODEL.yaml",
        state=MEAN_EXAMPLE,
    )


def _interpret(
    signature: ModelSignature,
    picture: NetworkInput,
    decoder: FinishedListDecoder,
    family: Preprocess,
    head: tuple[str, str],
) -> ModelInterpretation:
    """The reading of a head of that name, for that reason."""
    name, reason = head
    preprocess, preprocess_evidence = choose_preprocess(
        _before_transform(signature), picture, _with_color_of_mean(signature, family)
    )
    names = read_class_names(signature.metadata)
    stated = ("the head is stated",) if signature.metadata.get("visionedge.head") == name else ()
    return ModelInterpretation(
        head=name,
        input=replace(picture, batch=1),
        preprocess=preprocess,
        decoder=decoder,
        class_count=len(names) if names is not None else 0,
        needs_nms=False,
        evidence=(
            *stated,
            "a finished list: boxes in pixels, whole classes and scores",
            reason,
            *preprocess_evidence,
        ),
    )


def _before_transform(signature: ModelSignature) -> ModelSignature:
    """The signature with what is done to the picture before the graph resizes and pads it.

    It scales boxes back itself, so that only colour and scaling matter here.
    """
    input_ops = signature.input_ops
    if input_ops.known_transform is None or not set(input_ops.unknown.split(", ")) <= _TRANSFORM_OPERATORS:
        return signature
    factor, offset, swaps_red_blue, _ = input_ops.known_transform
    if max(factor) > _MIN_LARGE_FACTOR:  # 0-255 is made of 0-1 there, by a deviation of 1/255
        factor, offset = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    return replace(
        signature, input_ops=InputOps(factor, offset, swaps_red_blue, input_ops.kernels, "", input_ops.seen)
    )


def _with_color_of_mean(signature: ModelSignature, family: Preprocess) -> Preprocess:
    """Colours in the order of the mean that the graph subtracts: ImageNet's red is the largest."""
    known_transform = signature.input_ops.known_transform
    offset = known_transform[1] if known_transform else signature.input_ops.offset
    means = [
        abs(low / factor)
        for low, factor in zip(
            offset, (known_transform[0] if known_transform else signature.input_ops.factor), strict=True
        )
    ]
    if len(set(means)) < 3:
        return family
    return replace(family, color="rgb" if means[0] > means[2] else "bgr")
