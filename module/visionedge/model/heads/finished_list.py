"""Finished lists of boxes, classes and scores from PyTorch: torchvision, Azure AutoML, detectron2, MMDeploy.

Their graphs choose and suppress boxes themselves, which come in pixels of the input. What differs is how
classes count and how pictures are prepared: torchvision and AutoML have a background as class 0, detectron2
and MMDetection have none; torchvision and detectron2 subtract a mean in the graph, the others before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.input_ops import Opening
from visionedge.model.analysis.signature import Signature, Tensor
from visionedge.model.decoding import listed_rows, part
from visionedge.model.graph import Nodes
from visionedge.model.interpretation import (
    STATE_MEAN,
    NetworkInput,
    Preprocess,
    Reading,
    picture_input,
    stated_object,
)
from visionedge.model.labels import AUTOML_BACKGROUND, class_names
from visionedge.model.preprocessing import prepared

# These take a picture of any shape and resize it inside; ours keeps its proportions.
RGB_INPUT = Preprocess("rgb", 1 / 255, fit="letterbox", anchor="top-left")
BGR_INPUT = Preprocess("bgr", 1.0, fit="letterbox", anchor="top-left")
AUTOML_INPUT = Preprocess("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "stretch")

_OWN_TRANSFORM = frozenset({"Pad", "Resize"})
_LARGE_FACTOR = 50  # of pixels of 0-1: brought to 0-255


@dataclass(frozen=True, slots=True)
class FinishedList:
    """Decodes boxes [N, n, 4], corners in input pixels, classes and scores [N, n] or [N, n, 1].

    With `scores` empty they are the fifth column of the boxes. `count` is n where it is known.
    """

    boxes: str
    classes: str
    scores: str
    count: int | None

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The list, by falling score."""
        table = nodes.cast(self.boxes, "float32")
        if self.scores:
            boxes = nodes.reshape(table, 1, -1, 4)
            scores = nodes.cast(self.scores, "float32")
        else:
            table = nodes.reshape(table, 1, -1, 5)
            boxes, scores = part(nodes, table, 0, 4, 2), part(nodes, table, 4, 5, 2)
        ids = nodes.cast(self.classes, "float32")
        return listed_rows(
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

    def read(self, signature: Signature) -> Reading | None:
        """A reading where there are boxes, whole classes and scores, and nothing else.

        Raises:
            ModelError: nothing tells how its pictures are prepared.
        """
        picture = picture_input(signature)
        found = _three(signature)
        if picture is None or found is None or picture.batch not in (None, 1):
            return None
        stated = signature.metadata.get("visionedge.head") == self.name
        if not stated and signature.producer != "pytorch":
            return None  # Custom Vision's lists look the same
        boxes, classes, scores = found
        names = class_names(signature.metadata) or ()
        automl = names[:1] == (AUTOML_BACKGROUND,) and not signature.opening.until
        family = AUTOML_INPUT if automl else RGB_INPUT
        reason = (
            f"labels.json beside it begins with {AUTOML_BACKGROUND}, as Azure AutoML writes it"
            if automl
            else "its first nodes subtract a mean, as torchvision's do"
        )
        if not automl:
            _check_normalises(signature)
        decoder = FinishedList(boxes.name, classes.name, scores.name, _count(boxes))
        reading = _reading(signature, picture, decoder, family, (self.name, reason))
        clause = "class 0 is the background, as torchvision and AutoML have it"
        count = signature.classes.classified or 0
        return replace(reading, class_count=count, background=True, evidence=(*reading.evidence, clause))


@dataclass(frozen=True, slots=True)
class Detectron2:
    """detectron2's tracing export: boxes, classes, scores and the size of the picture; BGR of 0-255."""

    name: str = "detectron2"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where the fourth output is two whole numbers.

        Raises:
            ModelError: nothing tells how its pictures are prepared.
        """
        picture = picture_input(signature)
        sizes = [t for t in signature.outputs if (t.shape or ())[-1:] == (2,) and t.dtype.startswith("int")]
        rest = tuple(t for t in signature.outputs if t not in sizes)
        found = _three(replace(signature, outputs=rest)) if len(sizes) == 1 else None
        if picture is None or found is None or picture.batch not in (None, 1):
            return None
        _check_normalises(signature)
        boxes, classes, scores = found
        decoder = FinishedList(boxes.name, classes.name, scores.name, _count(boxes))
        reason = "its first nodes subtract a mean, as detectron2's do"
        return _reading(signature, picture, decoder, BGR_INPUT, (self.name, reason))


@dataclass(frozen=True, slots=True)
class MmDeploy:
    """MMDetection's models as MMDeploy exports them: boxes with their score, and classes from 0."""

    name: str = "mmdeploy"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where the two outputs are [N, n, 5] and whole [N, n].

        Raises:
            ModelError: nothing tells how its pictures are prepared.
        """
        picture = picture_input(signature)
        if picture is None or len(signature.inputs) != 1 or len(signature.outputs) != 2:
            return None
        boxes = [t for t in signature.outputs if (t.shape or ())[-1:] == (5,) and t.dtype.startswith("float")]
        classes = [t for t in signature.outputs if t.dtype.startswith("int") and len(t.shape or ()) in (1, 2)]
        if len(boxes) != 1 or len(classes) != 1 or picture.batch not in (None, 1):
            return None
        _check_normalises(signature)
        decoder = FinishedList(boxes[0].name, classes[0].name, "", _count(boxes[0]))
        reason = "boxes with their score and classes apart, as MMDeploy writes them"
        return _reading(signature, picture, decoder, RGB_INPUT, (self.name, reason))


HEADS = (Torchvision(), Detectron2(), MmDeploy())


def _three(signature: Signature) -> tuple[Tensor, Tensor, Tensor] | None:
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


def _count(boxes: Tensor) -> int | None:
    return (boxes.shape or (None, None))[-2]


def _check_normalises(signature: Signature) -> None:
    """Pictures are prepared in the graph, or it is stated how they are.

    Raises:
        ModelError: neither.
    """
    stated = stated_object(signature, "visionedge.input")
    if {"scale", "mean"} & set(stated) or signature.opening.scales or signature.opening.until:
        return
    raise ModelError(
        "gives a finished list of boxes, classes and scores, but nothing in it subtracts a mean, so how its"
        " pictures are prepared is not known; for Azure AutoML put its labels.json beside it, else state"
        " input.scale, input.mean and input.std in MODEL.yaml",
        state=STATE_MEAN,
    )


def _reading(
    signature: Signature,
    picture: NetworkInput,
    decoder: FinishedList,
    family: Preprocess,
    head: tuple[str, str],
) -> Reading:
    """The reading of a head of that name, for that reason."""
    name, reason = head
    way, ways = prepared(_before_transform(signature), picture, _at_range(signature, family))
    names = class_names(signature.metadata)
    stated = ("the head is stated",) if signature.metadata.get("visionedge.head") == name else ()
    return Reading(
        head=name,
        input=replace(picture, batch=1),
        preprocess=way,
        decoder=decoder,
        class_count=len(names) if names is not None else 0,
        suppress=False,
        evidence=(*stated, "a finished list: boxes in pixels, whole classes and scores", reason, *ways),
    )


def _before_transform(signature: Signature) -> Signature:
    """The signature with what is done to the picture before the graph resizes and pads it.

    It scales boxes back itself, so that only colour and scaling matter here.
    """
    opening = signature.opening
    if opening.until is None or not set(opening.unknown.split(", ")) <= _OWN_TRANSFORM:
        return signature
    factor, offset, swaps, _ = opening.until
    if max(factor) > _LARGE_FACTOR:  # 0-255 is made of 0-1 there, by a deviation of 1/255
        factor, offset = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    return replace(signature, opening=Opening(factor, offset, swaps, opening.kernels, "", opening.seen))


def _at_range(signature: Signature, family: Preprocess) -> Preprocess:
    """Colours in the order of the mean that the graph subtracts: ImageNet's red is the largest."""
    until = signature.opening.until
    offset = until[1] if until else signature.opening.offset
    means = [
        abs(low / factor)
        for low, factor in zip(offset, (until[0] if until else signature.opening.factor), strict=True)
    ]
    if len(set(means)) < 3:
        return family
    return replace(family, color="rgb" if means[0] > means[2] else "bgr")
