"""Boxes and scores of all cells in two outputs: YOLO-NAS, DAMO-YOLO, YOLOv4, PP-YOLOE without suppression.

Also models whose NMS plugin of TensorRT was removed (`onnx_file.remove_nms_plugin`). Most of these have the
same shapes and differ in the scaling of pixels, which a graph seldom shows: then a file beside the model or
its owner must state it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import (
    BoxDecoding,
    centres_to_corners,
    find_strides,
    select_best_rows,
    slice_axis,
)
from visionedge.model.exporter_files import parse_paddle_preprocess
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_only_input,
    find_picture_input,
    read_metadata_object,
)
from visionedge.model.onnx_file import NMS_PLUGIN_KEY, NmsPluginInputs
from visionedge.model.preprocessing import YOLO_INPUT, describe_exporter, interpret, is_detector

BOX_ENCODINGS = ("corners", "centers")
_FOREIGN_OPERATORS = frozenset({"NonMaxSuppression", "TopK", "Cos", "Sin"})
_MODEL_YAML_EXAMPLE = (
    "input: {color: rgb, scale: 0.00392156863, fit: letterbox}   # as for YOLO-NAS; your model's own"
)


@dataclass(frozen=True, slots=True)
class BoxesScoresDecoder(Decoder):
    """Decodes boxes [N, n, 4] (or [N, n, 1, 4]) and scores [N, n, C], or [N, C, n] if `columns`.

    `scale` (x, y) converts boxes to input pixels. `background` is the class of the background, -1 for none.
    `factor_input` is a second input [N, 2] for the scale factor of the picture; "" if there is none.
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
        """A scale factor of 1, if the network has an input for it."""
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
        return centres_to_corners(nodes, boxes)


@dataclass(frozen=True, slots=True)
class _BoxesAndScores:
    boxes: TensorInfo
    scores: TensorInfo
    anchors: int
    columns: bool

    @property
    def width(self) -> int:
        """The number of scores of an anchor."""
        return self.scores.side(1 if self.columns else 2) or 0


@dataclass(frozen=True, slots=True)
class BoxesScoresHead:
    """Two outputs, a box and the scores for each cell of a pyramid."""

    name: str = "boxes-scores"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if both have a row per cell, and nodes or a plugin show the encoding of boxes.

        Raises:
            ModelError: the encoding of boxes or the preprocessing is unknown.
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
        factor = next((t.name for t in signature.inputs if t.name != picture.name), "")
        decoder = BoxesScoresDecoder(
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
        )
        plugin = f", by {encoding.plugin}, which our own suppression replaces" if encoding.plugin else ""
        return interpret(
            self.name,
            signature,
            picture,
            decoder,
            family,
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"boxes and {pair.width} scores in separate outputs, for {pair.anchors} cells",
                f"boxes are {'centres and sizes' if encoding.centers else 'corners'}{plugin}",
                reason,
            ),
        )


def _find_outputs(signature: ModelSignature, picture: NetworkInput) -> _BoxesAndScores | None:
    """The two outputs, by their shapes."""
    if len(signature.outputs) != 2 or not _inputs_fit(signature, picture):
        return None
    is_plugin = NMS_PLUGIN_KEY in signature.metadata
    if not is_plugin and signature.operators & _FOREIGN_OPERATORS:
        return None
    found = []
    for boxes, scores in (signature.outputs, signature.outputs[::-1]):
        anchors, (first, second) = boxes.side(1), (scores.side(1), scores.side(2))
        # The boxes of a plugin can have a side of 1 before the last one.
        is_box = boxes.rank == 3 or (boxes.rank == 4 and boxes.side(2) == 1 and is_plugin)
        if not is_box or scores.rank != 3 or not anchors or boxes.side(-1) != 4:
            continue
        if not (boxes.is_float and scores.is_float):
            continue
        ways = [columns for columns, side in ((False, first), (True, second)) if side == anchors]
        if len(ways) == 1 and first and second and (is_plugin or _are_cells(anchors, picture)):
            found.append(_BoxesAndScores(boxes, scores, anchors, ways[0]))
    if len(found) == 2:  # both have four columns: a sigmoid computed the scores
        found = [pair for pair in found if signature.output_operators.get(pair.scores.name) == "Sigmoid"]
    return found[0] if len(found) == 1 else None


def _are_cells(count: int, picture: NetworkInput) -> bool:
    size = picture.width_px, picture.height_px
    return any(find_strides(count, *size, anchors) is not None for anchors in (1, 3))


def _inputs_fit(signature: ModelSignature, picture: NetworkInput) -> bool:
    """Whether the inputs are the picture alone, or the picture and its scale factor, as Paddle has them."""
    others = [t for t in signature.inputs if t.name != picture.name]
    return not others or (
        len(others) == 1
        and "scale" in others[0].name.lower()
        and (others[0].rank, others[0].side(1)) == (2, 2)
    )


def _read_encoding(signature: ModelSignature, pair: _BoxesAndScores) -> NmsPluginInputs:
    """The encoding of boxes and scores, by the plugin, else by the nodes."""
    said = read_metadata_object(signature, NMS_PLUGIN_KEY)
    if said:
        try:
            return NmsPluginInputs(**said)
        except TypeError:
            raise ModelError(f"metadata {NMS_PLUGIN_KEY} is not as this version writes it") from None
    boxes, scores = signature.ops(pair.boxes), signature.ops(pair.scores)
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
            "has separate outputs for boxes and scores, but scores of this kind are not supported", state=()
        )
    return NmsPluginInputs(
        "", box_encoding == "centers", relative=False, logits="Sigmoid" not in scores.operators
    )


def _choose_family_preprocess(signature: ModelSignature, picture: NetworkInput) -> tuple[Preprocess, str]:
    """The preprocessing in training, and the evidence for it.

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
        "has separate outputs for boxes and scores, as YOLO-NAS, DAMO-YOLO and PP-YOLOE, which differ in"
        " preprocessing; state input (color, scale, mean, std, fit) in MODEL.yaml beside it",
        state=(_MODEL_YAML_EXAMPLE,),
    )


# --- YOLOv4 of its port to PyTorch: boxes [N, n, 1, 4] as corners of 0-1, scores [N, n, classes] -----------


@dataclass(frozen=True, slots=True)
class YoloV4Decoder(Decoder):
    """Decodes both outputs for a picture of this size."""

    boxes: str
    scores: str
    anchors: int
    classes: int
    width_px: int
    height_px: int

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best rows, each anchor as its best class."""
        return select_best_rows(
            nodes,
            nodes.cast(self.scores, "float32"),
            self._make_box_decoding(nodes),
            anchors=self.anchors,
            classes=self.classes,
            limit=limit,
            one_class_per_anchor=True,
        )

    def _make_box_decoding(self, nodes: NodeBuilder) -> BoxDecoding:
        boxes = nodes.reshape(nodes.cast(self.boxes, "float32"), 0, self.anchors, 4)
        scale = nodes.floats(*[self.width_px, self.height_px] * 2)
        return lambda chosen, count: nodes.add("Mul", nodes.gather_rows(boxes, chosen, count, 4), scale)


@dataclass(frozen=True, slots=True)
class YoloV4Boxes:
    """YOLOv4 with decoded boxes: RGB from 0 to 1, stretched."""

    name: str = "yolov4-boxes"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if boxes of four dimensions and scores belong to three anchors in each cell."""
        picture = find_only_input(signature)
        boxes = [t for t in signature.outputs if t.rank == 4 and (t.side(2), t.side(3)) == (1, 4)]
        scores = [t for t in signature.outputs if t.rank == 3]
        if picture is None or not len(boxes) == len(scores) == len(signature.outputs) - 1 == 1:
            return None
        anchors, classes = scores[0].side(1), scores[0].side(2)
        size = picture.width_px, picture.height_px
        strides = find_strides(anchors, *size, anchors_per_cell=3)
        if not anchors or not classes or strides is None or boxes[0].side(1) != anchors:
            return None
        if not is_detector(signature, classes):
            return None
        return interpret(
            self.name,
            signature,
            picture,
            YoloV4Decoder(boxes[0].name, scores[0].name, anchors, classes, *size),
            replace(YOLO_INPUT, fit="stretch"),
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"{anchors} boxes and scores are 3 for each cell at strides {', '.join(map(str, strides))}",
            ),
        )


HEADS = (BoxesScoresHead(), YoloV4Boxes())
