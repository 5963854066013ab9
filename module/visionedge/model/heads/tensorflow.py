"""Detectors of the TensorFlow Object Detection API, with outputs for boxes, classes, scores and their number.

They are TFLite exports or saved models. Names of outputs can be meaningless or wrong, so the nodes that
compute them decide which output holds the classes, and whether classes count from 0 or 1.
"""

from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import convert_list_to_rows, slice_axis, to_pixels
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    MEAN_EXAMPLE,
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_only_input,
    states_scaling,
)
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import describe_class_count, interpret

BYTES_INPUT = Preprocess("rgb", 1.0, fit="stretch")
FLOAT_INPUT = Preprocess("rgb", 1.0, (127.5, 127.5, 127.5), (127.5, 127.5, 127.5), "stretch")


@dataclass(frozen=True, slots=True)
class TensorFlowListDecoder(Decoder):
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

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        boxes = nodes.add("Gather", nodes.cast(self.boxes, "float32"), nodes.int64s(1, 0, 3, 2), axis=2)
        if self.relative:
            boxes = to_pixels(nodes, boxes, self.width_px, self.height_px)
        ids = nodes.cast(self.classes, "float32")
        if self.first:
            ids = nodes.add("Sub", ids, nodes.floats(self.first))
        scores = nodes.cast(self.scores, "float32")
        return convert_list_to_rows(nodes, boxes, scores, ids, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class FourOutputs:
    """Four outputs that belong together; `first` is the id of the first class, `evidence` the reason."""

    boxes: TensorInfo
    classes: TensorInfo
    scores: TensorInfo
    number: TensorInfo
    first: int
    evidence: str


@dataclass(frozen=True, slots=True)
class TensorFlowDetection:
    """SSD and other detectors, as that API exports them: relative boxes."""

    name: str = "tfod"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there are four outputs of this kind, and boxes are relative."""
        picture, four = find_only_input(signature), find_four_outputs(signature)
        if picture is None or four is None or are_boxes_in_pixels(signature, four) is not False:
            return None
        family = BYTES_INPUT if picture.dtype == "uint8" else FLOAT_INPUT
        return interpret_four_outputs(
            self.name, signature, picture, four, relative=True, family=family, background=True
        )


def interpret_four_outputs(
    name: str,
    signature: ModelSignature,
    picture: NetworkInput,
    four: FourOutputs,
    *,
    relative: bool,
    family: Preprocess,
    background: bool,
) -> ModelInterpretation:
    """The interpretation of four outputs; a graph that chooses boxes itself counts as made for one picture.

    `background`: among the scores that the nodes show, one is for "none of the classes".
    """
    classes = _count_classes(signature, four, background)
    size = picture.width_px, picture.height_px
    return interpret(
        name,
        signature,
        _limit_batch(signature, picture),
        TensorFlowListDecoder(
            four.boxes.name,
            four.classes.name,
            four.scores.name,
            four.boxes.side(1),
            four.first,
            *size,
            relative,
        ),
        family,
        class_count=classes,
        needs_nms=False,
        evidence=(
            f"four outputs: boxes {'0-1' if relative else 'in pixels'}, classes, scores and their number",
            four.evidence,
            describe_class_count(classes),
        ),
        prepares_bytes_itself=True,
    )


def _limit_batch(signature: ModelSignature, picture: NetworkInput) -> NetworkInput:
    """The picture input; one picture at a time if the graph suppresses boxes."""
    return replace(picture, batch=1) if "NonMaxSuppression" in signature.operators else picture


def _count_classes(signature: ModelSignature, four: FourOutputs, background: bool) -> int:
    """The number of classes by the nodes, else by the labels; 0 if it is unknown."""
    names, seen = count_class_names(signature.metadata), signature.classes
    modulus = signature.source(four.classes).modulus
    if seen.from_nms is not None:
        return seen.from_nms
    if modulus is not None:
        return modulus
    if seen.from_scores is not None and seen.from_scores > background:
        return seen.from_scores - background
    return names


def find_four_outputs(signature: ModelSignature) -> FourOutputs | None:
    """Boxes, classes, scores and number, by shape and source; by name only if nodes do not show them.

    A saved model has more outputs (raw boxes, anchors, scores of all classes). They are ignored, but there
    must be exactly one output for each role. In PyTorch's exports with such outputs left comes before top, so
    they need a stated head.
    """
    if signature.producer == "pytorch" and "visionedge.head" not in signature.metadata:
        return None
    boxes = [t for t in signature.outputs if t.rank == 3 and t.side(2) == 4 and not _name_contains(t, "raw")]
    columns = [t for t in signature.outputs if t.rank == 2 and not _name_contains(t, "anchor")]
    numbers = [t for t in signature.outputs if t.rank in (0, 1)]
    if len(boxes) != 1 or len(columns) != 2 or len(numbers) != 1:
        return None
    if len({t.side(1) for t in (*boxes, *columns)} - {None}) > 1:
        return None
    evidence = _distinguish_classes(signature, columns)
    if evidence is None:
        return None
    classes, scores, reason = evidence
    first = signature.source(classes).offset
    if first not in (0, 1):
        return None
    clause = f"{reason}; they count from {first:.0f}"
    return FourOutputs(boxes[0], classes, scores, numbers[0], int(first), clause)


def _distinguish_classes(
    signature: ModelSignature, columns: list[TensorInfo]
) -> tuple[TensorInfo, TensorInfo, str] | None:
    """(classes, scores, evidence) of two outputs with the same shape."""
    integers = [t for t in columns if _is_integer(signature, t)]
    if len(integers) == 1:
        other = next(t for t in columns if t is not integers[0])
        return integers[0], other, "the classes are the output that holds integers"
    if "visionedge.head" not in signature.metadata:
        return None
    for classes, scores in (columns, columns[::-1]):
        if _name_contains(classes, "class") and _name_contains(scores, "score"):
            return classes, scores, "classes and scores are recognised by their names, as the head is stated"
    return None


def _is_integer(signature: ModelSignature, tensor: TensorInfo) -> bool:
    source = signature.source(tensor)
    return tensor.is_integer or source.is_integer or source.offset == 1


def are_boxes_in_pixels(signature: ModelSignature, four: FourOutputs) -> bool | None:
    """Whether boxes are in pixels; None if unknown.

    Their upper limit shows it. Without a limit: if the number of boxes is a float, the model was exported by
    the API and its boxes are relative; if it is an integer, both are possible.
    """
    stated = signature.metadata.get("visionedge.head")
    if stated is not None:
        return stated != "tfod"
    clip_max = signature.source(four.boxes).clip_max
    if clip_max is not None:
        return None if 2 < clip_max < 32 else clip_max >= 32
    return False if four.number.is_float else None


def _name_contains(tensor: TensorInfo, word: str) -> bool:
    return word in tensor.name.lower()


# --- EfficientDet by TensorFlow's automl: one list of seven columns, or four outputs in pixels ---------
#
# Its graph takes a picture of any size and letterboxes it at the top left, so its input is such a letterbox.

_AUTOML_INPUT = Preprocess("rgb", 1.0, fit="letterbox", anchor="top-left", pad=114)


@dataclass(frozen=True, slots=True)
class SevenColumnDecoder(Decoder):
    """Decodes [N, n, 7]: picture, box in pixels, score, class from 1.

    A box is top, left, bottom, right; with `sizes` it is left, top, width, height.
    """

    output: str
    count: int | None
    sizes: bool

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        table = nodes.cast(self.output, "float32")
        if self.sizes:
            corner, size = slice_axis(nodes, table, 1, 3, 2), slice_axis(nodes, table, 3, 5, 2)
            boxes = nodes.add("Concat", corner, nodes.add("Add", corner, size), axis=2)
        else:
            boxes = nodes.add("Gather", table, nodes.int64s(2, 1, 4, 3), axis=2)
        scores, ids = (
            nodes.reshape(slice_axis(nodes, table, column, column + 1, 2), 0, -1) for column in (5, 6)
        )
        ids = nodes.add("Sub", ids, nodes.floats(1.0))
        return convert_list_to_rows(nodes, boxes, scores, ids, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class EfficientDet:
    """EfficientDet with one or with four outputs."""

    name: str = "efficientdet"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there is one output of seven columns, or four outputs with boxes in pixels.

        Raises:
            ModelError: it takes floats and does not normalise them, so their range is unknown.
        """
        picture = find_only_input(signature)
        if picture is None:
            return None
        four = find_four_outputs(signature)
        if four is not None and are_boxes_in_pixels(signature, four):
            _check_range(signature, picture)
            return interpret_four_outputs(
                self.name, signature, picture, four, relative=False, family=_AUTOML_INPUT, background=False
            )
        found = _find_seven_columns(signature)
        if found is None:
            return None
        _check_range(signature, picture)
        output, sizes = found
        box = "left, top, width, height" if sizes else "top, left, bottom, right"
        return interpret(
            self.name,
            signature,
            _limit_batch(signature, picture),
            SevenColumnDecoder(output.name, output.side(1), sizes),
            _AUTOML_INPUT,
            class_count=signature.classes.from_nms
            or signature.classes.from_scores
            or count_class_names(signature.metadata),
            needs_nms=False,
            evidence=(f"one list of seven columns: picture, {box} in pixels, score, class from 1",),
            prepares_bytes_itself=True,
        )


HEADS = (TensorFlowDetection(), EfficientDet())


def _find_seven_columns(signature: ModelSignature) -> tuple[TensorInfo, bool] | None:
    """The output with seven columns, and whether its boxes have sizes; None if nodes do not show it."""
    if len(signature.outputs) != 1 or "NonMaxSuppression" not in signature.operators:
        return None
    output = signature.outputs[0]
    if output.rank != 3 or output.side(2) != 7:
        return None
    parts = signature.source(output).parts
    if len(parts) not in (4, 7) and not signature.states_head("efficientdet"):
        return None
    sizes = len(parts) == 7 and parts[3] == parts[4] == "Sub"
    if len(parts) == 7 and not sizes and "Sub" in parts[1:5]:
        return None
    return output, sizes


def _check_range(signature: ModelSignature, picture: NetworkInput) -> None:
    if picture.dtype == "uint8" or signature.input_ops.changes_values or states_scaling(signature):
        return
    raise ModelError(
        "is an EfficientDet that takes floats and does not normalise them, so the right mean is unknown;"
        " state input.scale, input.mean and input.std in MODEL.yaml beside it",
        state=MEAN_EXAMPLE,
    )
