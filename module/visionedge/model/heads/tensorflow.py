"""Detectors of the TensorFlow Object Detection API: boxes, classes, scores and their number, from the graph.

As a TFLite export or a saved model; with names that say nothing, or lie. What tells classes from scores, and
classes from 0 from classes from 1, are the nodes behind them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
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
from visionedge.model.labels import class_names
from visionedge.model.preprocessing import prepared

BYTES_INPUT = Preprocess("rgb", 1.0, fit="stretch")
FLOAT_INPUT = Preprocess("rgb", 1.0, (127.5, 127.5, 127.5), (127.5, 127.5, 127.5), "stretch")


@dataclass(frozen=True, slots=True)
class ListedBoxes:
    """Boxes [N, n, 4] as top, left, bottom, right (0-1, or pixels), classes and scores [N, n].

    `first` is the id of the first class. `count` is n where it is known.
    """

    boxes: str
    classes: str
    scores: str
    count: int | None
    first: int
    width_px: int
    height_px: int
    relative: bool = True

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The list, by falling score."""
        boxes = nodes.add("Gather", nodes.cast(self.boxes, "float32"), nodes.whole(1, 0, 3, 2), axis=2)
        if self.relative:
            boxes = nodes.add("Mul", boxes, nodes.floats(*[self.width_px, self.height_px] * 2))
        ids = nodes.cast(self.classes, "float32")
        if self.first:
            ids = nodes.add("Sub", ids, nodes.floats(self.first))
        scores = nodes.cast(self.scores, "float32")
        return listed_rows(nodes, boxes, scores, ids, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class Four:
    """Four outputs that belong together; `first` is the id of the first class, `told` how it is known."""

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    number: Tensor
    first: int
    told: str

    @property
    def count(self) -> int | None:
        """The rows of the list, None where that is open."""
        shape = self.boxes.shape
        return shape[1] if shape is not None else None


@dataclass(frozen=True, slots=True)
class Tfod:
    """SSD and its kin as that API exports them: relative boxes."""

    name: str = "tfod"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where there are such four outputs and boxes are relative."""
        picture = picture_input(signature)
        four = four_outputs(signature)
        if picture is None or four is None or len(signature.inputs) != 1:
            return None
        if in_pixels(signature, four) is not False:
            return None
        family = BYTES_INPUT if picture.dtype == "uint8" else FLOAT_INPUT
        return reading_of_four(
            self.name, signature, picture, four, relative=True, family=family, background=True
        )


def reading_of_four(
    name: str,
    signature: Signature,
    picture: NetworkInput,
    four: Four,
    *,
    relative: bool,
    family: Preprocess,
    background: bool,
) -> Reading:
    """The reading of four outputs; a graph that chooses boxes itself counts as made for one picture.

    `background`: a score for each anchor to be none of the classes counts among those that its nodes show.
    """
    way, ways = prepared(signature, picture, family, by_itself=True)
    classes = _class_count(signature, four, background)
    boxes, ids, scores = four.boxes.name, four.classes.name, four.scores.name
    size = picture.width_px, picture.height_px
    stated = signature.metadata.get("visionedge.head") == name
    return Reading(
        head=name,
        input=replace(picture, batch=1) if "NonMaxSuppression" in signature.operators else picture,
        preprocess=way,
        decoder=ListedBoxes(boxes, ids, scores, four.count, four.first, *size, relative),
        class_count=classes,
        suppress=False,
        evidence=(
            *(("the head is stated",) if stated else ()),
            f"four outputs: boxes {'0-1' if relative else 'in pixels'}, classes, scores and their number",
            four.told,
            f"{classes} classes are seen in it" if classes else "nothing in it tells the number of classes",
            *ways,
        ),
    )


def _class_count(signature: Signature, four: Four, background: bool) -> int:
    """How many classes: as its nodes or its labels say, 0 where nothing does."""
    names = class_names(signature.metadata)
    origin = signature.origins.get(four.classes.name)
    seen = signature.classes
    if seen.suppressed is not None:
        return seen.suppressed
    if origin is not None and origin.modulus is not None:
        return origin.modulus
    if seen.scored is not None and seen.scored > background:
        return seen.scored - background
    return len(names) if names is not None else 0


def four_outputs(signature: Signature) -> Four | None:
    """Boxes, classes, scores and number, each told by shape and origin; names only where nodes say nothing.

    A saved model has more outputs (raw boxes, anchors, scores of all classes): those without a part in this
    are let be, as long as no two could take the same part. What PyTorch exports with such outputs has left
    in front of top, and is none of this unless its head is stated.
    """
    if signature.producer == "pytorch" and "visionedge.head" not in signature.metadata:
        return None
    boxes = [t for t in signature.outputs if _fits(t, 3) and (t.shape or ())[2] == 4 and not _hints(t, "raw")]
    columns = [t for t in signature.outputs if _fits(t, 2)]
    columns = [t for t in columns if not _hints(t, "anchor")]
    numbers = [t for t in signature.outputs if t.shape is not None and len(t.shape) <= 1]
    if len(boxes) != 1 or len(columns) != 2 or len(numbers) != 1:
        return None
    known = {shape[1] for t in (*boxes, *columns) if (shape := t.shape) is not None} - {None}
    if len(known) > 1:
        return None
    told = _told_apart(signature, columns)
    if told is None:
        return None
    classes, scores, reason = told
    origin = signature.origins.get(classes.name)
    plus = origin.plus if origin is not None else 0.0
    first = 1 if plus == 1 else 0
    if plus not in (0, 1):
        return None
    return Four(boxes[0], classes, scores, numbers[0], first, f"{reason}; they count from {first}")


def _told_apart(signature: Signature, columns: list[Tensor]) -> tuple[Tensor, Tensor, str] | None:
    """(classes, scores, why) of two outputs of one shape."""
    whole = [t for t in columns if _is_whole(signature, t)]
    if len(whole) == 1:
        other = next(t for t in columns if t is not whole[0])
        return whole[0], other, "classes are the ones that come from whole numbers"
    if "visionedge.head" not in signature.metadata:
        return None
    for classes, scores in (columns, columns[::-1]):
        if _hints(classes, "class") and _hints(scores, "score"):
            return classes, scores, "classes and scores are told by their names, as the head is stated"
    return None


def _is_whole(signature: Signature, tensor: Tensor) -> bool:
    origin = signature.origins.get(tensor.name)
    return tensor.dtype.startswith("int") or (origin is not None and (origin.whole or origin.plus == 1))


def in_pixels(signature: Signature, four: Four) -> bool | None:
    """Whether boxes are in pixels; None where that cannot be known.

    Told by what they are cut off at. Where nothing cuts them, this API's number of boxes is a float, and its
    boxes are relative; others give a whole number and either kind of boxes.
    """
    stated = signature.metadata.get("visionedge.head")
    if stated is not None:
        return stated != "tfod"
    origin = signature.origins.get(four.boxes.name)
    ceiling = origin.ceiling if origin is not None else None
    if ceiling is not None:
        return None if 2 < ceiling < 32 else ceiling >= 32
    return False if four.number.dtype.startswith("float") else None


def _fits(tensor: Tensor, rank: int) -> bool:
    return tensor.shape is not None and len(tensor.shape) == rank


def _hints(tensor: Tensor, word: str) -> bool:
    return word in tensor.name.lower()


# EfficientDet as TensorFlow's automl exports it: one list of seven columns, or four outputs in pixels.
#
# Its graph takes a picture of any size and brings it to its own, keeping its shape: so it is fed a letterbox
# with the picture at the top left, as it would make one.


_AUTOML_INPUT = Preprocess("rgb", 1.0, fit="letterbox", anchor="top-left", pad=114)


@dataclass(frozen=True, slots=True)
class SevenColumns:
    """Decodes [N, n, 7]: picture, box, score, class from 1; a box is top, left, bottom, right in pixels.

    With `sizes` it is left, top, width, height.
    """

    output: str
    count: int | None
    sizes: bool

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The list, by falling score."""
        table = nodes.cast(self.output, "float32")
        if self.sizes:
            corner, size = part(nodes, table, 1, 3, 2), part(nodes, table, 3, 5, 2)
            boxes = nodes.add("Concat", corner, nodes.add("Add", corner, size), axis=2)
        else:
            boxes = nodes.add("Gather", table, nodes.whole(2, 1, 4, 3), axis=2)
        scores, ids = (nodes.reshape(part(nodes, table, column, column + 1, 2), 0, -1) for column in (5, 6))
        ids = nodes.add("Sub", ids, nodes.floats(1.0))
        return listed_rows(nodes, boxes, scores, ids, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class EfficientDet:
    """Both forms of it."""

    name: str = "efficientdet"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where the outputs fit one of them.

        Raises:
            ModelError: it takes floats that nothing in it normalises, so how is not known.
        """
        picture = picture_input(signature)
        if picture is None or len(signature.inputs) != 1:
            return None
        four = four_outputs(signature)
        if four is not None and in_pixels(signature, four):
            _check_range(signature, picture)
            return reading_of_four(
                self.name, signature, picture, four, relative=False, family=_AUTOML_INPUT, background=False
            )
        found = _seven(signature)
        if found is None:
            return None
        _check_range(signature, picture)
        return _reading(self.name, signature, picture, *found)


HEADS = (Tfod(), EfficientDet())


def _reading(name: str, signature: Signature, picture: NetworkInput, output: Tensor, sizes: bool) -> Reading:
    way, ways = prepared(signature, picture, _AUTOML_INPUT, by_itself=True)
    names = class_names(signature.metadata)
    seen = signature.classes.suppressed or signature.classes.scored
    box = "left, top, width, height" if sizes else "top, left, bottom, right"
    clauses = [f"one list of seven columns: picture, {box} in pixels, score, class from 1", *ways]
    if signature.metadata.get("visionedge.head") == name:
        clauses.insert(0, "the head is stated")
    return Reading(
        head=name,
        input=replace(picture, batch=1) if "NonMaxSuppression" in signature.operators else picture,
        preprocess=way,
        decoder=SevenColumns(output.name, (output.shape or (1, None))[1], sizes),
        class_count=seen or (len(names) if names is not None else 0),
        suppress=False,
        evidence=tuple(clauses),
    )


def _seven(signature: Signature) -> tuple[Tensor, bool] | None:
    """The output of seven columns, and whether its boxes have sizes; only where its nodes show columns."""
    if len(signature.outputs) != 1 or "NonMaxSuppression" not in signature.operators:
        return None
    output = signature.outputs[0]
    if output.shape is None or len(output.shape) != 3 or output.shape[2] != 7:
        return None
    origin = signature.origins.get(output.name)
    parts = origin.parts if origin is not None else ()
    if len(parts) not in (4, 7) and signature.metadata.get("visionedge.head") != "efficientdet":
        return None
    sizes = len(parts) == 7 and parts[3] == parts[4] == "Sub"
    if len(parts) == 7 and not sizes and "Sub" in parts[1:5]:
        return None
    return output, sizes


def _check_range(signature: Signature, picture: NetworkInput) -> None:
    stated = stated_object(signature, "visionedge.input")
    if picture.dtype == "uint8" or signature.opening.scales or {"scale", "mean", "std"} & set(stated):
        return
    raise ModelError(
        "is an EfficientDet that takes floats and normalises nothing itself: whether with ImageNet's mean or "
        "its own is not known; state input.scale, input.mean and input.std in MODEL.yaml beside it",
        state=STATE_MEAN,
    )
