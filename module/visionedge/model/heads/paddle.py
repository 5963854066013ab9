"""PaddleDetection's exports with the suppression in the graph: [n, 6] as class, score, box, and a count.

Beside the picture they take its scale factor, `scale_factor` (height, width), and some its size,
`im_shape` (height, width): both get the values for an unscaled picture, so boxes are in input pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import convert_list_to_rows, slice_axis
from visionedge.model.exporter_files import PADDLE_KEY, make_paddle_preprocess_error, parse_paddle_preprocess
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_picture_input,
    states_scaling,
)
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import interpret

PLAIN_INPUT = Preprocess("rgb", 1 / 255, fit="stretch")
IMAGENET_INPUT = Preprocess("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "stretch")

_ATTENTION_OPERATORS = frozenset({"Softmax", "MatMul"})
_SMALL_KERNELS = frozenset({(3, 2)})


@dataclass(frozen=True, slots=True)
class PaddleDecoder(Decoder):
    """Decodes [n, 6] of one picture; only the first `number` rows, if the model outputs their number."""

    table: str
    number: str | None
    scale: str
    shape: str | None
    count: int | None
    width_px: int
    height_px: int

    def feeds(self, nodes: NodeBuilder, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - sizes are constants
        """A scale factor of 1, and the size of the input."""
        feeds = {self.scale: nodes.reshape(nodes.floats(1.0, 1.0), 1, 2)}
        if self.shape is not None:
            feeds[self.shape] = nodes.reshape(nodes.floats(self.height_px, self.width_px), 1, 2)
        return feeds

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The list, by falling score."""
        table, count = nodes.cast(self.table, "float32"), self.count
        if self.number is not None:
            end = nodes.cast(nodes.reshape(self.number, -1), "int64")
            table = nodes.add("Slice", table, nodes.int64s(0), end, nodes.int64s(0))
            count = None
        ids, scores = (
            nodes.reshape(slice_axis(nodes, table, column, column + 1, 1), 1, -1) for column in (0, 1)
        )
        boxes = nodes.reshape(slice_axis(nodes, table, 2, 6, 1), 1, -1, 4)
        most = limit if self.count is None else min(limit, self.count)
        return convert_list_to_rows(nodes, boxes, scores, ids, count=count, limit=most)


@dataclass(frozen=True, slots=True)
class PaddleHead:
    """PP-YOLOE, PP-YOLO, YOLOv3, PicoDet and RT-DETR of PaddleDetection."""

    name: str = "paddle"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if inputs and outputs are those of PaddleDetection.

        Raises:
            ModelError: the scaling of its pixels is unknown, or stated as something unsupported.
        """
        picture = find_picture_input(signature)
        sizes = _find_size_inputs(signature)
        found = _find_outputs(signature)
        if picture is None or sizes is None or found is None:
            return None
        family, reason = _choose_family_preprocess(signature, picture)
        return interpret(
            self.name,
            signature,
            replace(picture, batch=1),
            _make_decoder(found, sizes, picture.width_px, picture.height_px),
            family,
            class_count=signature.classes.from_nms or count_class_names(signature.metadata),
            needs_nms=False,
            evidence=(
                f"outputs are a list of class, score and box{' and its length' if found[1] else ''}",
                f"{sizes[0].name} takes the scale factor of the picture",
                reason,
            ),
        )


HEADS = (PaddleHead(),)


def _make_decoder(
    outputs: tuple[TensorInfo, TensorInfo | None],
    sizes: tuple[TensorInfo, TensorInfo | None],
    width_px: int,
    height_px: int,
) -> PaddleDecoder:
    table, number = outputs
    scale, shape = sizes
    return PaddleDecoder(
        table=table.name,
        number=number.name if number is not None else None,
        scale=scale.name,
        shape=shape.name if shape is not None else None,
        count=table.side(0),
        width_px=width_px,
        height_px=height_px,
    )


def _find_outputs(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo | None] | None:
    """(list, number): float [n, 6], and the number of its rows as an integer, if it is an output."""
    tables = [t for t in signature.outputs if t.rank == 2 and t.side(1) == 6]
    numbers = [t for t in signature.outputs if t.rank in (0, 1)]
    if len(tables) != 1 or len(numbers) > 1 or len(tables) + len(numbers) != len(signature.outputs):
        return None
    if not tables[0].is_float or not all(number.is_integer for number in numbers):
        return None
    return tables[0], numbers[0] if numbers else None


def _find_size_inputs(signature: ModelSignature) -> tuple[TensorInfo, TensorInfo | None] | None:
    """(scale_factor, im_shape), both float [N, 2]; as their shapes are equal, their names decide."""
    others = [t for t in signature.inputs if t.rank == 2]
    if len(others) != len(signature.inputs) - 1 or not 1 <= len(others) <= 2:
        return None
    if any(t.dtype != "float32" or t.side(1) not in (2, None) for t in others):
        return None
    scales = [t for t in others if "scale" in t.name.lower()]
    shapes = [t for t in others if "shape" in t.name.lower() and t not in scales]
    if len(scales) != 1 or len(scales) + len(shapes) != len(others):
        return None
    return scales[0], shapes[0] if shapes else None


def _choose_family_preprocess(signature: ModelSignature, picture: NetworkInput) -> tuple[Preprocess, str]:
    """The preprocessing in training, which its shapes do not show.

    ImageNet's mean is subtracted for PP-YOLOE and PicoDet, not for PP-YOLOE+ and RT-DETR. SSD has its own
    mean, and YOLOX takes pixels of 0-255. So the exporter's file or the owner must state it. Of the models
    with attention and without suppression, only RT-DETR begins with small convolutions; DETR and DINO, which
    subtract the mean, do not.
    """
    if states_scaling(signature):
        return PLAIN_INPUT, "its scaling is stated"
    if "RoiAlign" in signature.operators:
        raise ModelError(
            "is a two-stage Paddle model, which takes pictures of varying sizes; this is not supported"
        )
    if (preprocess := parse_paddle_preprocess(signature, picture)) is not None:
        return preprocess, f"{PADDLE_KEY} beside it says how pictures are prepared"
    if any(signature.input_ops.offset):
        return IMAGENET_INPUT, "its first nodes subtract a mean"
    attends = "NonMaxSuppression" not in signature.operators and signature.operators >= _ATTENTION_OPERATORS
    if attends and signature.input_ops.kernels == _SMALL_KERNELS:
        return PLAIN_INPUT, "it has attention and no suppression, as RT-DETR has: pixels of 0-1 and no mean"
    raise make_paddle_preprocess_error()
