"""Detectors of the TensorFlow Object Detection API: boxes, classes, scores and their number, from the graph.

As a TFLite export or a saved model. Names of outputs can be meaningless or wrong, so the nodes that compute
them decide which are classes and which are scores, and whether classes count from 0 or 1.
"""

from dataclasses import dataclass, replace

from visionedge.errors import ModelError
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
from visionedge.model.labels import read_class_names
from visionedge.model.preprocessing import choose_preprocess

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
            boxes = nodes.add("Mul", boxes, nodes.floats(*[self.width_px, self.height_px] * 2))
        ids = nodes.cast(self.classes, "float32")
        if self.first:
            ids = nodes.add("Sub", ids, nodes.floats(self.first))
        scores = nodes.cast(self.scores, "float32")
        return convert_list_to_rows(nodes, boxes, scores, ids, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class FourOutputs:
    """Four outputs that belong together; `first` is the id of the first class, `evidence` why."""

    boxes: TensorInfo
    classes: TensorInfo
    scores: TensorInfo
    number: TensorInfo
    first: int
    evidence: str

    @property
    def count(self) -> int | None:
        """The rows of the list, None if that is open."""
        shape = self.boxes.shape
        return shape[1] if shape is not None else None


@dataclass(frozen=True, slots=True)
class TensorFlowDetection:
    """SSD and its kin as that API exports them: relative boxes."""

    name: str = "tfod"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there are such four outputs and boxes are relative."""
        picture = find_picture_input(signature)
        four = find_four_outputs(signature)
        if picture is None or four is None or len(signature.inputs) != 1:
            return None
        if are_boxes_in_pixels(signature, four) is not False:
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
    """The reading of four outputs; a graph that chooses boxes itself counts as made for one picture.

    `background`: a score for each anchor to be none of the classes counts among those that its nodes show.
    """
    preprocess, preprocess_evidence = choose_preprocess(
        signature, picture, family, prepares_bytes_itself=True
    )
    classes = _count_classes(signature, four, background)
    boxes, ids, scores = four.boxes.name, four.classes.name, four.scores.name
    size = picture.width_px, picture.height_px
    stated = signature.metadata.get("visionedge.head") == name
    return ModelInterpretation(
        head=name,
        input=replace(picture, batch=1) if "NonMaxSuppression" in signature.operators else picture,
        preprocess=preprocess,
        decoder=TensorFlowListDecoder(boxes, ids, scores, four.count, four.first, *size, relative),
        class_count=classes,
        needs_nms=False,
        evidence=(
            *(("the head is stated",) if stated else ()),
            f"four outputs: boxes {'0-1' if relative else 'in pixels'}, classes, scores and their number",
            four.evidence,
            f"{classes} classes are visible in it" if classes else "it does not show the number of classes",
            *preprocess_evidence,
        ),
    )


def _count_classes(signature: ModelSignature, four: FourOutputs, background: bool) -> int:
    """How many classes: as its nodes or its labels say, 0 if nothing does."""
    names = read_class_names(signature.metadata)
    source = signature.output_sources.get(four.classes.name)
    seen = signature.classes
    if seen.from_nms is not None:
        return seen.from_nms
    if source is not None and source.modulus is not None:
        return source.modulus
    if seen.from_scores is not None and seen.from_scores > background:
        return seen.from_scores - background
    return len(names) if names is not None else 0


def find_four_outputs(signature: ModelSignature) -> FourOutputs | None:
    """Boxes, classes, scores and number, by shape and source; by name only if nodes do not show them.

    A saved model has more outputs (raw boxes, anchors, scores of all classes). They are ignored, unless two
    outputs fit the same role. PyTorch's exports with such outputs have left before top, so they need a
    stated head.
    """
    if signature.producer == "pytorch" and "visionedge.head" not in signature.metadata:
        return None
    boxes = [
        t
        for t in signature.outputs
        if _has_rank(t, 3) and (t.shape or ())[2] == 4 and not _name_contains(t, "raw")
    ]
    columns = [t for t in signature.outputs if _has_rank(t, 2)]
    columns = [t for t in columns if not _name_contains(t, "anchor")]
    numbers = [t for t in signature.outputs if t.shape is not None and len(t.shape) <= 1]
    if len(boxes) != 1 or len(columns) != 2 or len(numbers) != 1:
        return None
    known = {shape[1] for t in (*boxes, *columns) if (shape := t.shape) is not None} - {None}
    if len(known) > 1:
        return None
    evidence = _tell_classes_from_scores(signature, columns)
    if evidence is None:
        return None
    classes, scores, reason = evidence
    source = signature.output_sources.get(classes.name)
    offset = source.offset if source is not None else 0.0
    first = 1 if offset == 1 else 0
    if offset not in (0, 1):
        return None
    return FourOutputs(boxes[0], classes, scores, numbers[0], first, f"{reason}; they count from {first}")


def _tell_classes_from_scores(
    signature: ModelSignature, columns: list[TensorInfo]
) -> tuple[TensorInfo, TensorInfo, str] | None:
    """(classes, scores, evidence) of two outputs with the same shape."""
    whole = [t for t in columns if _is_integer(signature, t)]
    if len(whole) == 1:
        other = next(t for t in columns if t is not whole[0])
        return whole[0], other, "the classes are the output that holds integers"
    if "visionedge.head" not in signature.metadata:
        return None
    for classes, scores in (columns, columns[::-1]):
        if _name_contains(classes, "class") and _name_contains(scores, "score"):
            return classes, scores, "classes and scores are recognised by their names, as the head is stated"
    return None


def _is_integer(signature: ModelSignature, tensor: TensorInfo) -> bool:
    source = signature.output_sources.get(tensor.name)
    if tensor.dtype.startswith("int"):
        return True
    return source is not None and (source.is_integer or source.offset == 1)


def are_boxes_in_pixels(signature: ModelSignature, four: FourOutputs) -> bool | None:
    """Whether boxes are in pixels; None if unknown.

    Their upper limit shows it. Without a limit: if the number of boxes is a float, the model is of this
    API, and its boxes are relative; with an integer number both are possible.
    """
    stated = signature.metadata.get("visionedge.head")
    if stated is not None:
        return stated != "tfod"
    source = signature.output_sources.get(four.boxes.name)
    clip_max = source.clip_max if source is not None else None
    if clip_max is not None:
        return None if 2 < clip_max < 32 else clip_max >= 32
    return False if four.number.dtype.startswith("float") else None


def _has_rank(tensor: TensorInfo, rank: int) -> bool:
    return tensor.shape is not None and len(tensor.shape) == rank


def _name_contains(tensor: TensorInfo, word: str) -> bool:
    return word in tensor.name.lower()


# --- EfficientDet by TensorFlow's automl: one list of seven columns, or four outputs in pixels ---------
#
# Its graph takes a picture of any size and letterboxes it, with the picture at the top left. So it is given
# such a letterbox.


_AUTOML_INPUT = Preprocess("rgb", 1.0, fit="letterbox", anchor="top-left", pad=114)


@dataclass(frozen=True, slots=True)
class SevenColumnDecoder(Decoder):
    """Decodes [N, n, 7]: picture, box, score, class from 1; a box is top, left, bottom, right in pixels.

    With `sizes` it is left, top, width, height.
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
        """An interpretation if the outputs fit one of them.

        Raises:
            ModelError: it takes floats and does not normalise them, so their range is unknown.
        """
        picture = find_picture_input(signature)
        if picture is None or len(signature.inputs) != 1:
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
        return _interpret(self.name, signature, picture, *found)


HEADS = (TensorFlowDetection(), EfficientDet())


def _interpret(
    name: str, signature: ModelSignature, picture: NetworkInput, output: TensorInfo, sizes: bool
) -> ModelInterpretation:
    preprocess, preprocess_evidence = choose_preprocess(
        signature, picture, _AUTOML_INPUT, prepares_bytes_itself=True
    )
    names = read_class_names(signature.metadata)
    seen = signature.classes.from_nms or signature.classes.from_scores
    box = "left, top, width, height" if sizes else "top, left, bottom, right"
    clauses = [
        f"one list of seven columns: picture, {box} in pixels, score, class from 1",
        *preprocess_evidence,
    ]
    if signature.metadata.get("visionedge.head") == name:
        clauses.insert(0, "the head is stated")
    return ModelInterpretation(
        head=name,
        input=replace(picture, batch=1) if "NonMaxSuppression" in signature.operators else picture,
        preprocess=preprocess,
        decoder=SevenColumnDecoder(output.name, (output.shape or (1, None))[1], sizes),
        class_count=seen or (len(names) if names is not None else 0),
        needs_nms=False,
        evidence=tuple(clauses),
    )


def _find_seven_columns(signature: ModelSignature) -> tuple[TensorInfo, bool] | None:
    """The output with seven columns, and whether its boxes have sizes; None if nodes do not show it."""
    if len(signature.outputs) != 1 or "NonMaxSuppression" not in signature.operators:
        return None
    output = signature.outputs[0]
    if output.shape is None or len(output.shape) != 3 or output.shape[2] != 7:
        return None
    source = signature.output_sources.get(output.name)
    parts = source.parts if source is not None else ()
    if len(parts) not in (4, 7) and signature.metadata.get("visionedge.head") != "efficientdet":
        return None
    sizes = len(parts) == 7 and parts[3] == parts[4] == "Sub"
    if len(parts) == 7 and not sizes and "Sub" in parts[1:5]:
        return None
    return output, sizes


def _check_range(signature: ModelSignature, picture: NetworkInput) -> None:
    stated = read_metadata_object(signature, "visionedge.input")
    if (
        picture.dtype == "uint8"
        or signature.input_ops.changes_values
        or {"scale", "mean", "std"} & set(stated)
    ):
        return
    raise ModelError(
        "is an EfficientDet that takes floats and does not normalise them: its mean may be ImageNet's or "
        "its own; state input.scale, input.mean and input.std in MODEL.yaml beside it",
        state=MEAN_EXAMPLE,
    )
