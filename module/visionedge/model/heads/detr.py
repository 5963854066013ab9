"""Detectors that answer a fixed set of queries (RT-DETR, D-FINE, DEIM, RF-DETR): no anchors, no suppression.

They come in three forms: a finished list (labels, boxes, scores) with the size of the picture as a second
input; logits and boxes for each query; both side by side in one output, as Ultralytics writes them.

The first DETRs (DETR, YOLOS, Table Transformer) have the second form too, but their logits are those of a
softmax whose last class is "no object". Their graphs show it: their boxes come directly from a layer. Later
DETRs start from reference points, which are learned, chosen or sampled, and refine them to boxes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import (
    centres_to_corners,
    convert_list_to_rows,
    find_strides,
    select_best_rows,
    slice_axis,
    to_pixels,
)
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    MEAN_EXAMPLE,
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_only_input,
    find_picture_input,
    read_metadata_object,
)
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import interpret, is_detector

PLAIN_INPUT = Preprocess("rgb", 1 / 255, fit="stretch", resample="antialias")
IMAGENET_INPUT = replace(PLAIN_INPUT, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

ScoreEncoding = Literal["logits", "probabilities"]

MAX_QUERIES = 2000
_ZERO_SCORE_LOGIT = -1e4  # as a logit
_ATTENTION_OPERATORS = frozenset({"Attention", "MultiHeadAttention"})
_PRODUCT_OPERATORS = frozenset({"Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"})
# Operators of later DETRs, in which queries are chosen, sample the picture, and refine their boxes.
_REFINING_OPERATORS = frozenset({"GridSample", "Log", "TopK"})
_MIN_PATCH = 4
_COCO_CLASS_COUNTS = (90, 91)
_MAX_ENCODER_PARTS = 8


@dataclass(frozen=True, slots=True)
class DetrListDecoder(Decoder):
    """Decodes a finished list; `sizes` is the input for (width, height), float or integer."""

    labels: str
    boxes: str
    scores: str
    sizes: str
    sizes_dtype: str
    count: int | None
    width_px: int
    height_px: int

    def feeds(self, nodes: NodeBuilder, pictures: str) -> Mapping[str, str]:
        """A size of 1 x 1: boxes are then relative, and the order (w, h) or (h, w) does not matter."""
        # One value of each picture times 0: so the sizes have the batch of the pictures.
        corner = slice_axis(nodes, slice_axis(nodes, slice_axis(nodes, pictures, 0, 1, 1), 0, 1, 2), 0, 1, 3)
        nothing = nodes.add("Mul", nodes.cast(nodes.reshape(corner, -1, 1), "float32"), nodes.floats(0.0))
        ones = nodes.add("Add", nothing, nodes.floats(1.0, 1.0))
        return {self.sizes: nodes.cast(ones, self.sizes_dtype)}

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        return convert_list_to_rows(
            nodes,
            to_pixels(nodes, nodes.cast(self.boxes, "float32"), self.width_px, self.height_px),
            nodes.cast(self.scores, "float32"),
            nodes.cast(self.labels, "float32"),
            count=self.count,
            limit=limit,
        )


@dataclass(frozen=True, slots=True)
class DetrQueryDecoder(Decoder):
    """Decodes scores [N, Q, C] and boxes [N, Q, 4] (centre and size, 0-1), or both in one [N, Q, 4 + C].

    `queries` is Q, if known. `score_encoding`: logits of a sigmoid or of a softmax, or "probabilities". The
    last class of a softmax, "no object", is left out, and so is a `background`; `classes` counts neither.
    """

    boxes: str
    scores: str
    queries: int | None
    classes: int
    width_px: int
    height_px: int
    score_encoding: ScoreEncoding
    softmax: bool = False
    background: bool = False

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best pairs of query and class."""
        boxes = nodes.cast(self.boxes, "float32")
        scores = boxes if self.boxes == self.scores else nodes.cast(self.scores, "float32")
        if self.softmax:
            scores = nodes.add("Softmax", scores, axis=2) if self.score_encoding == "logits" else scores
        if self.softmax or self.background:
            scores = slice_axis(nodes, scores, 0, self.classes, 2)
        sigmoid = self.score_encoding == "logits" and not self.softmax
        if self.boxes == self.scores:
            boxes, scores = (
                slice_axis(nodes, boxes, 0, 4, 2),
                slice_axis(nodes, boxes, 4, 4 + self.classes, 2),
            )
        if self.queries is None:
            more = nodes.int64s(0, 0, 0, 0, limit, 0)
            boxes = nodes.add("Pad", boxes, more)
            scores = nodes.add("Pad", scores, more, nodes.floats(_ZERO_SCORE_LOGIT if sigmoid else 0.0))
        return select_best_rows(
            nodes,
            scores,
            lambda chosen, count: self._corners(nodes, boxes, chosen, count),
            anchors=limit if self.queries is None else self.queries,
            classes=self.classes,
            limit=limit,
            activate=(lambda n, values: n.add("Sigmoid", values)) if sigmoid else None,
            one_class_per_anchor=self.softmax,
        )

    def _corners(self, nodes: NodeBuilder, boxes: str, chosen: str, count: int) -> str:
        scale = nodes.floats(*[self.width_px, self.height_px] * 2)
        picked = nodes.add("Mul", nodes.gather_rows(boxes, chosen, count, 4), scale)
        return centres_to_corners(nodes, picked)


@dataclass(frozen=True, slots=True)
class Detr:
    """Labels, boxes and scores, and a second input for the size: exports of RT-DETR, D-FINE and DEIM."""

    name: str = "detr"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if two inputs and three outputs fit, distinguished by shapes and types."""
        picture = find_picture_input(signature)
        sizes = _find_sizes_input(signature)
        found = _find_list(signature)
        if picture is None or sizes is None or found is None:
            return None
        labels, boxes, scores = found
        count = boxes.side(1) or scores.side(1) or signature.source(scores).count
        classes = signature.source(labels).modulus or 0
        decoder = DetrListDecoder(
            labels.name,
            boxes.name,
            scores.name,
            sizes.name,
            sizes.dtype,
            count,
            picture.width_px,
            picture.height_px,
        )
        clauses = [
            f"a list of {count or 'any number of'} boxes with integer labels; {sizes.name} takes the size"
        ]
        if classes:
            clauses.append(f"labels are remainders of a division by {classes}")
        return _interpret(self.name, signature, picture, decoder, classes=classes, clauses=clauses)


@dataclass(frozen=True, slots=True)
class DetrQueries:
    """Scores and boxes for each query.

    With `softmax` the first DETRs: scores of C classes and of "no object", and boxes directly from a layer.
    Else exports of RF-DETR, and of the others from Hugging Face.
    """

    name: str
    softmax: bool

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if scores and boxes belong to the same queries of such a transformer.

        Raises:
            ModelError: its scores are only a part of the output of a softmax.
        """
        found = _find_queries(signature)
        if found is None or found.width < 1 + self.softmax:
            return None
        if not signature.states_head(self.name) and _is_first_generation(signature, found) != self.softmax:
            return None
        score_encoding = _read_score_encoding(signature, found)
        if found.score_operator == ("Sigmoid" if self.softmax else "Softmax"):
            return None
        background = not self.softmax and _has_background(signature, found)
        decoder = found.decoder(score_encoding, softmax=self.softmax, background=background)
        if self.softmax:
            clauses = [
                f"scores of {decoder.classes} classes and of no object, and boxes, for {found.count} queries",
                "boxes come directly from a layer, as in the first DETRs: scores are those of a softmax",
            ]
        else:
            clauses = [f"scores of {found.width} classes and boxes for {found.count or 'some'} queries"]
        if background:
            clauses.append("its outputs have the names of RF-DETR's, whose last class is the background")
        return _interpret(
            self.name, signature, found.picture, decoder, classes=decoder.classes, clauses=clauses
        )


@dataclass(frozen=True, slots=True)
class DetrSingleOutput:
    """RT-DETR as Ultralytics exports it: boxes and scores of each query side by side."""

    name: str = "rtdetr-ultralytics"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the one output joins boxes and sigmoid scores of queries, not of cells."""
        picture = find_only_input(signature)
        if picture is None or len(signature.outputs) != 1:
            return None
        (output,) = signature.outputs
        parts, queries, width = signature.source(output).parts, output.side(1), output.side(2) or 0
        if output.rank != 3 or width < 5 or len(parts) != 2 or parts[1] != "Sigmoid":
            return None
        if queries is None or not all(_may_be_queries(n, picture, signature) for n in (queries, width)):
            return None
        if not _is_transformer(signature) or not is_detector(signature, width - 4):
            return None
        decoder = DetrQueryDecoder(
            output.name,
            output.name,
            queries,
            width - 4,
            picture.width_px,
            picture.height_px,
            score_encoding="probabilities",
        )
        clauses = [f"one output joins the boxes and the sigmoid scores of {queries} queries, not of cells"]
        return _interpret(self.name, signature, picture, decoder, classes=width - 4, clauses=clauses)


HEADS = (
    Detr(),
    DetrQueries("detr-raw", softmax=False),
    DetrQueries("detr-softmax", softmax=True),
    DetrSingleOutput(),
)


@dataclass(frozen=True, slots=True)
class _Queries:
    """Scores [N, count, width], computed by `score_operator`, and boxes [N, count, 4] of the queries."""

    picture: NetworkInput
    scores: TensorInfo
    boxes: TensorInfo
    count: int | None
    width: int
    score_operator: str

    def decoder(self, score_encoding: ScoreEncoding, *, softmax: bool, background: bool) -> DetrQueryDecoder:
        """The decoder for these scores; the last class of a softmax, or a background, is left out."""
        names, size = (self.boxes.name, self.scores.name), (self.picture.width_px, self.picture.height_px)
        classes = self.width - (softmax or background)
        return DetrQueryDecoder(*names, self.count, classes, *size, score_encoding, softmax, background)


def _find_queries(signature: ModelSignature) -> _Queries | None:
    """Scores and boxes of a transformer for the same queries."""
    picture, pair = find_only_input(signature), _find_scores_and_boxes(signature)
    if picture is None or pair is None or not _is_transformer(signature):
        return None
    scores, boxes = pair
    count, width = scores.side(1), scores.side(2) or 0
    if not _may_be_queries(count, picture, signature) or (count is None and width < 2):
        return None
    return _Queries(picture, scores, boxes, count, width, signature.output_operators.get(scores.name, ""))


def _has_background(signature: ModelSignature, found: _Queries) -> bool:
    """Whether it is an RF-DETR with custom classes: its last column is the background, which is left out.

    An RF-DETR trained on COCO has 91 columns, one per category number, and all of them count.
    """
    is_rf_detr = {found.boxes.name, found.scores.name} == {"dets", "labels"}
    all_named = count_class_names(signature.metadata) == found.width
    return is_rf_detr and found.width > 1 and found.width not in _COCO_CLASS_COUNTS and not all_named


def _is_first_generation(signature: ModelSignature, found: _Queries) -> bool:
    """Whether it is one of the first DETRs, whose boxes come directly from a layer."""
    output_ops = signature.ops(found.boxes)
    direct = output_ops.has_weights and not output_ops.has_arithmetic
    return direct and not signature.operators & _REFINING_OPERATORS


def _read_score_encoding(signature: ModelSignature, found: _Queries) -> ScoreEncoding:
    """The encoding of the scores.

    Raises:
        ModelError: they are an unknown part of the output of a softmax.
    """
    behind = signature.source(found.scores).operator
    if found.score_operator in ("Sigmoid", "Softmax") or behind == "Sigmoid":
        return "probabilities"
    if behind == "Softmax":
        raise ModelError(
            "is a DETR whose scores are only a part of the output of a softmax; export it with all logits,"
            f" those of 'no object' included. Seen: {signature}",
            state=(),
        )
    return "logits"


def _interpret(
    name: str,
    signature: ModelSignature,
    picture: NetworkInput,
    decoder: DetrListDecoder | DetrQueryDecoder,
    *,
    classes: int,
    clauses: list[str],
) -> ModelInterpretation:
    family, reason = _choose_family_preprocess(signature)
    return interpret(
        name,
        signature,
        picture,
        decoder,
        family,
        class_count=classes,
        needs_nms=False,
        evidence=(*clauses, reason),
    )


def _choose_family_preprocess(signature: ModelSignature) -> tuple[Preprocess, str]:
    """The preprocessing of the backbone: transformers and the first ResNets subtract ImageNet's mean."""
    kernels = signature.input_ops.kernels
    if (
        not kernels
        and not signature.input_ops.unknown
        and not {"mean", "std"} <= set(read_metadata_object(signature, "visionedge.input"))
    ):
        raise ModelError(
            "is a DETR whose first convolutions cannot be found, and these show whether"
            " ImageNet's mean is subtracted from its pixels; state input.scale, input.mean and input.std in"
            " MODEL.yaml beside it",
            state=MEAN_EXAMPLE,
        )
    if any(side == stride and side >= _MIN_PATCH for side, stride in kernels):
        return (
            IMAGENET_INPUT,
            "it starts with patches, as transformers do: ImageNet's mean and deviation",
        )
    if any(side == 7 for side, _ in kernels):
        return IMAGENET_INPUT, "it starts with 7 x 7, as the first ResNets: ImageNet's mean and deviation"
    if signature.transformer_parts > _MAX_ENCODER_PARTS:
        return IMAGENET_INPUT, "its queries are chosen behind a transformer: ImageNet's mean and deviation"
    return PLAIN_INPUT, "it starts with small convolutions: pixels of 0-1 and no mean"


def _find_list(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo, TensorInfo] | None:
    """(labels, boxes, scores): integer [N, n], float [N, n, 4], float [N, n]."""
    if len(signature.outputs) != 3:
        return None
    labels = [t for t in signature.outputs if t.rank == 2 and t.is_integer]
    boxes = [t for t in signature.outputs if t.rank == 3 and t.side(2) == 4 and t.is_float]
    scores = [t for t in signature.outputs if t.rank == 2 and t.is_float]
    if not len(labels) == len(boxes) == len(scores) == 1:
        return None
    found = labels[0], boxes[0], scores[0]
    return found if len({t.side(1) for t in found} - {None}) <= 1 else None


def _find_sizes_input(signature: ModelSignature) -> TensorInfo | None:
    """The second of two inputs, if it is integer [N, 2]."""
    others = [t for t in signature.inputs if t.rank == 2 and t.side(1) in (2, None)]
    return others[0] if len(signature.inputs) == 2 and len(others) == 1 and others[0].is_integer else None


def _find_scores_and_boxes(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo] | None:
    """(scores, boxes) of the same queries; if both have four columns, a sigmoid computes the boxes."""
    outputs = signature.outputs
    if len(outputs) != 2 or not all(t.rank == 3 and t.is_float and t.side(2) for t in outputs):
        return None
    ways = [(a, b) for a, b in (outputs, outputs[::-1]) if b.side(2) == 4 and a.side(1) == b.side(1)]
    if len(ways) > 1:
        ways = _pairs_with_refined_boxes(
            ways, lambda t: signature.output_operators.get(t.name) == "Sigmoid"
        ) or _pairs_with_refined_boxes(ways, lambda t: signature.ops(t).has_arithmetic)
    return ways[0] if len(ways) == 1 else None


def _pairs_with_refined_boxes(
    ways: list[tuple[TensorInfo, TensorInfo]], refined: Callable[[TensorInfo], bool]
) -> list[tuple[TensorInfo, TensorInfo]]:
    """The pairs in which only the boxes are refined by nodes behind the last layer."""
    return [(scores, boxes) for scores, boxes in ways if refined(boxes) and not refined(scores)]


def _is_transformer(signature: ModelSignature) -> bool:
    """Whether it has attention and no suppression."""
    used = signature.operators
    attends = used & _ATTENTION_OPERATORS or ("Softmax" in used and used & _PRODUCT_OPERATORS)
    return bool(attends) and "NonMaxSuppression" not in used


def _may_be_queries(count: int | None, picture: NetworkInput, signature: ModelSignature) -> bool:
    """Whether this can be the number of queries, not of cells; an open number needs a TopK or GridSample."""
    if count is None:
        return bool({"GridSample", "TopK"} & signature.operators)
    cells = (find_strides(count, picture.width_px, picture.height_px, each) for each in (1, 3))
    return 0 < count <= MAX_QUERIES and not any(cells)
