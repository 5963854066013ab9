"""Boxes and scores of all cells in two outputs: YOLO-NAS, DAMO-YOLO, PP-YOLOE without its suppression.

Also models whose NMS plugin of TensorRT was removed (`onnx_file.remove_nms_plugin`). All of these have the
same shapes and differ in the scaling of pixels, which a graph seldom shows: then a file beside it or its
owner must state it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from visionedge.errors import ModelError
from visionedge.model.analysis.output_ops import OutputOps
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import find_strides, select_best_rows, slice_axis, to_corners
from visionedge.model.exporter_files import parse_paddle_preprocess
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_picture_input,
    read_metadata_object,
)
from visionedge.model.onnx_file import NMS_PLUGIN_KEY, NmsPluginInputs
from visionedge.model.preprocessing import YOLO_INPUT, choose_preprocess, describe_exporter, is_detector

BOX_ENCODINGS = ("corners", "centers")
_FOREIGN_OPERATORS = frozenset({"NonMaxSuppression", "TopK", "Cos", "Sin"})
_MODEL_YAML_EXAMPLE = (
    "input: {color: rgb, scale: 0.00392156863, fit: letterbox}   # as for YOLO-NAS; your model's own"
)


@dataclass(frozen=True, slots=True)
class BoxesScoresDecoder(Decoder):
    """Decodes boxes [N, n, 4] (or [N, n, 1, 4]) and scores [N, n, C], or [N, C, n] if `columns`.

    `scale` brings boxes to input pixels. `background` is a class that means nothing, -1 for none.
    `factor_input` is a second input [N, 2] that takes what the picture was scaled by; "" if there is none.
    """

    boxes: str
    scores: str
    anchors: int
    classes: int
    columns: bool
    centers: bool
    scale: tuple[float, float]
    logits: bool
    background: int = -1
    factor_input: str = ""

    def feeds(self, nodes: NodeBuilder, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - sizes are constants
        """No scaling, where the network asks for it."""
        return {self.factor_input: nodes.reshape(nodes.floats(1.0, 1.0), 1, 2)} if self.factor_input else {}

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best rows, each anchor as its best class; boxes are decoded only for the chosen anchors."""
        boxes = nodes.reshape(nodes.cast(self.boxes, "float32"), 0, self.anchors, 4)
        scores = nodes.cast(self.scores, "float32")
        if self.columns:
            scores = nodes.add("Transpose", scores, perm=[0, 2, 1])
        return select_best_rows(
            nodes,
            self._foreground(nodes, scores),
            lambda chosen, count: self._boxes(nodes, boxes, chosen, count),
            anchors=self.anchors,
            classes=self.classes,
            limit=limit,
            activate=(lambda n, values: n.add("Sigmoid", values)) if self.logits else None,
            one_class_per_anchor=True,
        )

    def _foreground(self, nodes: NodeBuilder, scores: str) -> str:
        """The scores without the background, which comes first or last."""
        if self.background < 0:
            return scores
        first = 1 if self.background == 0 else 0
        return slice_axis(nodes, scores, first, first + self.classes, 2)

    def _boxes(self, nodes: NodeBuilder, table: str, chosen: str, count: int) -> str:
        boxes = nodes.gather_rows(table, chosen, count, 4)
        if self.scale != (1.0, 1.0):
            boxes = nodes.add("Mul", boxes, nodes.floats(*self.scale * 2))
        if not self.centers:
            return boxes
        return to_corners(
            nodes, slice_axis(nodes, boxes, 0, 2, axis=2), slice_axis(nodes, boxes, 2, 4, axis=2)
        )


@dataclass(frozen=True, slots=True)
class _BoxesAndScores:
    boxes: TensorInfo
    scores: TensorInfo
    anchors: int
    columns: bool

    @property
    def width(self) -> int:
        """How many scores an anchor has."""
        return (self.scores.shape or (0, 0, 0))[1 if self.columns else 2] or 0


@dataclass(frozen=True, slots=True)
class BoxesScoresHead:
    """Two outputs, a box and the scores for each cell of a pyramid."""

    name: str = "boxes-scores"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if both have a row per cell, and nodes or a plugin show how boxes are written.

        Raises:
            ModelError: it is unknown how boxes are written, or how pictures are prepared.
        """
        picture = find_picture_input(signature)
        pair = _find_outputs(signature, picture) if picture is not None else None
        if picture is None or pair is None:
            return None
        encoding = _read_encoding(signature, pair)
        classes = pair.width - (encoding.background >= 0)
        if encoding.background not in (-1, 0, pair.width - 1) or not is_detector(signature, classes):
            return None
        family, reason = _choose_family_preprocess(signature, picture)
        preprocess, preprocess_evidence = choose_preprocess(signature, picture, family)
        stated = ("the head is stated",) if signature.metadata.get("visionedge.head") == self.name else ()
        factor = next((t.name for t in signature.inputs if t.name != picture.name), "")
        return ModelInterpretation(
            head=self.name,
            input=picture,
            preprocess=preprocess,
            decoder=BoxesScoresDecoder(
                pair.boxes.name,
                pair.scores.name,
                pair.anchors,
                classes,
                pair.columns,
                encoding.centers,
                (float(picture.width_px), float(picture.height_px)) if encoding.relative else (1.0, 1.0),
                encoding.logits,
                encoding.background,
                factor,
            ),
            class_count=classes,
            needs_nms=True,
            evidence=(
                *stated,
                f"boxes and {pair.width} scores in separate outputs, for {pair.anchors} cells",
                f"boxes are {'centres and sizes' if encoding.centers else 'corners'}"
                f"{f', by {encoding.plugin}, which our own suppression replaces' if encoding.plugin else ''}",
                reason,
                *preprocess_evidence,
            ),
        )


HEADS = (BoxesScoresHead(),)


def _find_outputs(signature: ModelSignature, picture: NetworkInput) -> _BoxesAndScores | None:
    """The two outputs, by their shapes."""
    if len(signature.outputs) != 2 or not _inputs_fit(signature, picture):
        return None
    if NMS_PLUGIN_KEY not in signature.metadata and signature.operators & _FOREIGN_OPERATORS:
        return None
    found = []
    for boxes, scores in (signature.outputs, signature.outputs[::-1]):
        shape, other = _flatten_shape(boxes, plugin=NMS_PLUGIN_KEY in signature.metadata), scores.shape
        if shape is None or other is None or len(other) != 3 or not shape[1] or shape[2] != 4:
            continue
        if not (boxes.dtype.startswith("float") and scores.dtype.startswith("float")):
            continue
        sides = [columns for columns, side in ((False, other[1]), (True, other[2])) if side == shape[1]]
        if len(sides) == 1 and other[1] and other[2] and _are_cells(shape[1], picture, signature):
            found.append(_BoxesAndScores(boxes, scores, shape[1], sides[0]))
    if len(found) == 2:  # both four wide: the one that a sigmoid made are scores
        found = [pair for pair in found if signature.output_operators.get(pair.scores.name) == "Sigmoid"]
    return found[0] if len(found) == 1 else None


def _flatten_shape(tensor: TensorInfo, *, plugin: bool) -> tuple[int | None, ...] | None:
    """The shape of boxes; what a plugin is given has a side of 1 in it."""
    shape = tensor.shape
    if plugin and shape is not None and len(shape) == 4 and shape[2] == 1:
        return (*shape[:2], shape[3])
    return shape if shape is not None and len(shape) == 3 else None


def _are_cells(count: int, picture: NetworkInput, signature: ModelSignature) -> bool:
    size = picture.width_px, picture.height_px
    return NMS_PLUGIN_KEY in signature.metadata or any(
        find_strides(count, *size, each) is not None for each in (1, 3)
    )


def _inputs_fit(signature: ModelSignature, picture: NetworkInput) -> bool:
    """The picture alone, or with what it was scaled by, as Paddle wants it."""
    others = [t for t in signature.inputs if t.name != picture.name]
    return not others or (
        len(others) == 1 and "scale" in others[0].name.lower() and (others[0].shape or ())[1:] == (2,)
    )


def _read_encoding(signature: ModelSignature, pair: _BoxesAndScores) -> NmsPluginInputs:
    """How boxes and scores are written: by the plugin, else by the nodes."""
    said = read_metadata_object(signature, NMS_PLUGIN_KEY)
    if said:
        try:
            return NmsPluginInputs(**said)
        except TypeError:
            raise ModelError(f"metadata {NMS_PLUGIN_KEY} is not as this version writes it") from None
    boxes = signature.output_ops.get(pair.boxes.name, OutputOps())
    scores = signature.output_ops.get(pair.scores.name, OutputOps())
    stated = signature.metadata.get("visionedge.form", "")
    box_encoding = stated or {"corners": "corners", "centres": "centers"}.get(boxes.box_encoding, "")
    if box_encoding not in BOX_ENCODINGS:
        raise ModelError(
            "has separate outputs for boxes and scores, but no node shows whether a box is two corners or a"
            " centre and a size; state boxes: corners (or centers) in MODEL.yaml beside it",
            state=("boxes: corners   # or centers",),
        )
    if not scores.has_weights or "Softmax" in scores.operators:
        raise ModelError(
            "has separate outputs for boxes and scores, but its kind of scores is not supported", state=()
        )
    return NmsPluginInputs(
        "", box_encoding == "centers", relative=False, logits="Sigmoid" not in scores.operators
    )


def _choose_family_preprocess(signature: ModelSignature, picture: NetworkInput) -> tuple[Preprocess, str]:
    """How its pictures were prepared in training.

    Raises:
        ModelError: it is unknown.
    """
    if (preprocess := parse_paddle_preprocess(signature, picture)) is not None:
        return preprocess, "the file of its export says how pictures are prepared"
    if words := describe_exporter(signature):
        return YOLO_INPUT, words[0]
    stated = read_metadata_object(signature, "visionedge.input")
    if "scale" in stated or "mean" in stated:
        return YOLO_INPUT, "its scaling is stated"
    if signature.input_ops.changes_values:
        return YOLO_INPUT, "its first nodes scale the picture"
    raise ModelError(
        "gives boxes and scores apart, as YOLO-NAS, DAMO-YOLO and PP-YOLOE do, whose pictures are prepared in"
        " different ways; state input (color, scale, mean, std, fit) in MODEL.yaml beside it",
        state=(_MODEL_YAML_EXAMPLE,),
    )
