"""Detectors that answer a fixed set of queries (RT-DETR, D-FINE, DEIM, RF-DETR): no anchors, no suppression.

They come in three forms: a finished list (labels, boxes, scores) with the size of the picture as a second
input; logits and boxes for each query; both side by side in one output, as Ultralytics writes them.

The first DETRs (DETR, YOLOS, Table Transformer) have the second form too, but their logits are those of a
softmax whose last class is "no object". Their graphs show it: boxes come directly from a layer, while all
later ones refine boxes from reference points that they sample at, choose or learn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from visionedge.errors import ModelError
from visionedge.model.analysis.output_ops import OutputOps
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import (
    convert_list_to_rows,
    find_strides,
    select_best_rows,
    slice_axis,
    to_corners,
)
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
from visionedge.model.preprocessing import choose_preprocess, is_detector

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
        corner = slice_axis(nodes, slice_axis(nodes, slice_axis(nodes, pictures, 0, 1, 1), 0, 1, 2), 0, 1, 3)
        nothing = nodes.add("Mul", nodes.cast(nodes.reshape(corner, -1, 1), "float32"), nodes.floats(0.0))
        ones = nodes.add("Add", nothing, nodes.floats(1.0, 1.0))
        return {self.sizes: nodes.cast(ones, self.sizes_dtype)}

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        scale = nodes.floats(*[self.width_px, self.height_px] * 2)
        return convert_list_to_rows(
            nodes,
            nodes.add("Mul", nodes.cast(self.boxes, "float32"), scale),
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
        return to_corners(nodes, slice_axis(nodes, picked, 0, 2, 2), slice_axis(nodes, picked, 2, 4, 2))


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
        source = signature.output_sources.get(scores.name)
        count = (
            _read_side(boxes, 1) or _read_side(scores, 1) or (source.count if source is not None else None)
        )
        remainder = signature.output_sources.get(labels.name)
        classes = (remainder.modulus if remainder is not None else None) or 0
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
            clauses.append(f"labels are the remainder of {classes}")
        return _interpret(self.name, signature, picture, decoder, classes=classes, clauses=clauses)


@dataclass(frozen=True, slots=True)
class DetrRaw:
    """Logits and boxes for each query: exports of RF-DETR, and of the others from Hugging Face."""

    name: str = "detr-raw"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if scores and boxes belong to the same queries of a transformer.

        Raises:
            ModelError: its scores are a part of what a softmax gave.
        """
        found = _find_queries(signature)
        stated = signature.metadata.get("visionedge.head") == self.name
        if found is None or (not stated and _is_first_generation(signature, found)):
            return None
        score_encoding = _read_score_encoding(signature, found)
        if score_encoding is None or found.score_operator == "Softmax":
            return None
        decoder = found.decoder(score_encoding, background=_has_background(signature, found))
        clauses = [f"scores of {found.width} classes and boxes for {found.count or 'some'} queries"]
        if decoder.classes < found.width:
            clauses.append("its outputs are called as RF-DETR's, whose last class is the background")
        return _interpret(
            self.name, signature, found.picture, decoder, classes=decoder.classes, clauses=clauses
        )


@dataclass(frozen=True, slots=True)
class DetrSoftmax:
    """The first DETRs: logits of C classes and of no object, and boxes straight from a layer."""

    name: str = "detr-softmax"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if nothing chooses queries, samples for them, or refines their boxes.

        Raises:
            ModelError: its scores are a part of what a softmax gave.
        """
        found = _find_queries(signature)
        stated = signature.metadata.get("visionedge.head") == self.name
        if found is None or found.width < 2 or not (stated or _is_first_generation(signature, found)):
            return None
        score_encoding = _read_score_encoding(signature, found)
        if score_encoding is None or found.score_operator == "Sigmoid":
            return None
        decoder = found.decoder(score_encoding, softmax=True)
        clauses = [
            f"scores of {decoder.classes} classes and of no object, and boxes, for {found.count} queries",
            "boxes come straight from a layer, as those of the first DETRs: scores are a softmax's",
        ]
        return _interpret(
            self.name, signature, found.picture, decoder, classes=decoder.classes, clauses=clauses
        )


@dataclass(frozen=True, slots=True)
class DetrSingleOutput:
    """RT-DETR as Ultralytics exports it: boxes and scores of each query side by side."""

    name: str = "rtdetr-ultralytics"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the one output joins boxes and sigmoid scores of queries, not of cells."""
        picture = find_picture_input(signature)
        if picture is None or len(signature.inputs) != 1 or len(signature.outputs) != 1:
            return None
        output = signature.outputs[0]
        source = signature.output_sources.get(output.name)
        parts = source.parts if source is not None else ()
        queries, width = _read_side(output, 1), _read_side(output, 2) or 0
        if _rank(output) != 3 or width < 5 or len(parts) != 2 or parts[1] != "Sigmoid":
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
        clauses = [
            f"one output joins the boxes and a sigmoid's scores of {queries} queries, which are no cells"
        ]
        return _interpret(self.name, signature, picture, decoder, classes=width - 4, clauses=clauses)


HEADS = (Detr(), DetrRaw(), DetrSoftmax(), DetrSingleOutput())


@dataclass(frozen=True, slots=True)
class _Queries:
    """Scores [N, count, width], computed by `score_operator`, and boxes [N, count, 4] of the queries."""

    picture: NetworkInput
    scores: TensorInfo
    boxes: TensorInfo
    count: int | None
    width: int
    score_operator: str

    def decoder(
        self, score_encoding: ScoreEncoding, *, softmax: bool = False, background: bool = False
    ) -> DetrQueryDecoder:
        """The decoder for these scores; the last class of a softmax, or a background, is left out."""
        names, size = (self.boxes.name, self.scores.name), (self.picture.width_px, self.picture.height_px)
        classes = self.width - (softmax or background)
        return DetrQueryDecoder(*names, self.count, classes, *size, score_encoding, softmax, background)


def _find_queries(signature: ModelSignature) -> _Queries | None:
    """Scores and boxes of a transformer for the same queries."""
    picture = find_picture_input(signature)
    pair = _find_scores_and_boxes(signature)
    if picture is None or pair is None or len(signature.inputs) != 1 or not _is_transformer(signature):
        return None
    scores, boxes = pair
    count, width = _read_side(scores, 1), _read_side(scores, 2) or 0
    if not _may_be_queries(count, picture, signature) or (count is None and width < 2):
        return None
    return _Queries(picture, scores, boxes, count, width, signature.output_operators.get(scores.name, ""))


def _has_background(signature: ModelSignature, found: _Queries) -> bool:
    """Whether it is an RF-DETR with custom classes: its last column is the background, which is left out.

    An RF-DETR trained on COCO has 91 columns, one per category number, and all of them count.
    """
    called = {found.boxes.name, found.scores.name} == {"dets", "labels"}
    names = read_class_names(signature.metadata)
    whole = names is not None and len(names) == found.width
    return called and found.width > 1 and found.width not in _COCO_CLASS_COUNTS and not whole


def _is_first_generation(signature: ModelSignature, found: _Queries) -> bool:
    """Whether it is one of the first DETRs; any number of queries may be theirs."""
    output_ops = signature.output_ops.get(found.boxes.name)
    straight = output_ops is not None and output_ops.has_weights and not output_ops.has_arithmetic
    return straight and not signature.operators & _REFINING_OPERATORS


def _read_score_encoding(signature: ModelSignature, found: _Queries) -> ScoreEncoding | None:
    """What the scores are.

    Raises:
        ModelError: they are an unknown part of the output of a softmax.
    """
    source = signature.output_sources.get(found.scores.name)
    behind = source.operator if source is not None else ""
    if found.score_operator in ("Sigmoid", "Softmax") or behind == "Sigmoid":
        return "probabilities"
    if behind == "Softmax":
        raise ModelError(
            "is a DETR whose scores are a part of the output of a softmax; export it with its logits,"
            f" 'no object' included. Seen: {signature}",
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
    preprocess, evidence = choose_preprocess(signature, picture, family)
    if signature.metadata.get("visionedge.head") == name:
        clauses = ["the head is stated", *clauses]
    return ModelInterpretation(
        head=name,
        input=picture,
        preprocess=preprocess,
        decoder=decoder,
        class_count=classes,
        needs_nms=False,
        evidence=(*clauses, reason, *evidence),
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
        return IMAGENET_INPUT, "it starts with 7 x 7, as the first ResNets do: ImageNet's mean and deviation"
    if signature.transformer_parts > _MAX_ENCODER_PARTS:
        return IMAGENET_INPUT, "its queries are chosen behind a transformer: ImageNet's mean and deviation"
    return PLAIN_INPUT, "it starts with small convolutions: pixels of 0-1 and no mean"


def _find_list(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo, TensorInfo] | None:
    """(labels, boxes, scores): integer [N, n], float [N, n, 4], float [N, n]."""
    if len(signature.outputs) != 3:
        return None
    labels = [t for t in signature.outputs if _rank(t) == 2 and t.dtype in ("int64", "int32")]
    boxes = [t for t in signature.outputs if _rank(t) == 3 and _read_side(t, 2) == 4 and _is_float(t)]
    scores = [t for t in signature.outputs if _rank(t) == 2 and _is_float(t)]
    if not len(labels) == len(boxes) == len(scores) == 1:
        return None
    found = labels[0], boxes[0], scores[0]
    return found if len({_read_side(t, 1) for t in found} - {None}) <= 1 else None


def _find_sizes_input(signature: ModelSignature) -> TensorInfo | None:
    """The second of two inputs, if it is integer [N, 2]."""
    others = [t for t in signature.inputs if _rank(t) == 2 and _read_side(t, 1) in (2, None)]
    if len(signature.inputs) != 2 or len(others) != 1 or others[0].dtype not in ("int64", "int32"):
        return None
    return others[0]


def _find_scores_and_boxes(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo] | None:
    """(scores, boxes) of the same queries; if both have four columns, a sigmoid computes the boxes."""
    outputs = signature.outputs
    if len(outputs) != 2 or not all(_rank(t) == 3 and _is_float(t) and _read_side(t, 2) for t in outputs):
        return None
    ways = [
        (a, b)
        for a, b in (outputs, outputs[::-1])
        if _read_side(b, 2) == 4 and _read_side(a, 1) == _read_side(b, 1)
    ]
    if len(ways) > 1:
        ways = _pairs_with_refined_boxes(
            ways, lambda t: signature.output_operators.get(t.name) == "Sigmoid"
        ) or _pairs_with_refined_boxes(
            ways, lambda t: signature.output_ops.get(t.name, OutputOps()).has_arithmetic
        )
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
    """Whether the number is one of queries, not of cells; an open number needs a TopK or GridSample."""
    if count is None:
        return bool({"GridSample", "TopK"} & signature.operators)
    cells = (find_strides(count, picture.width_px, picture.height_px, each) for each in (1, 3))
    return 0 < count <= MAX_QUERIES and not any(cells)


def _rank(tensor: TensorInfo) -> int:
    return -1 if tensor.shape is None else len(tensor.shape)


def _read_side(tensor: TensorInfo, axis: int) -> int | None:
    return tensor.shape[axis] if tensor.shape is not None and len(tensor.shape) > axis else None


def _is_float(tensor: TensorInfo) -> bool:
    return tensor.dtype in ("float32", "float16")
