"""FastestDet: one map at stride 16, for each cell an objectness, a box and classes: [N, 5 + classes, h, w].

The centre leaves its cell by a tanh, the size is a sigmoid of the whole picture's; a score is the objectness
to the power of 0.6 times the class to the power of 0.4.
"""

from dataclasses import dataclass

import numpy as np

from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import compute_grid, make_cell_table, select_best_rows, slice_axis, to_corners
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_picture_input,
)
from visionedge.model.labels import read_class_names
from visionedge.model.preprocessing import choose_preprocess

FASTESTDET_INPUT = Preprocess("bgr", 1 / 255, fit="stretch")

STRIDE_PX = 16
_CONCAT_PARTS = ("Sigmoid", "Conv", "Softmax")


@dataclass(frozen=True, slots=True)
class FastestDetDecoder(Decoder):
    """Decodes [N, 5 + classes, rows, columns] over a picture of this size."""

    output: str
    classes: int
    width_px: int
    height_px: int

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best rows, each cell as its best class."""
        columns, rows = compute_grid(self.width_px, self.height_px, STRIDE_PX)
        table = nodes.reshape(nodes.cast(self.output, "float32"), 0, 5 + self.classes, rows * columns)
        table = nodes.add("Transpose", table, perm=[0, 2, 1])
        return select_best_rows(
            nodes,
            nodes.add("Pow", slice_axis(nodes, table, 5, 5 + self.classes, axis=2), nodes.floats(0.4)),
            lambda chosen, count: self._boxes(nodes, table, chosen, count),
            anchors=rows * columns,
            classes=self.classes,
            limit=limit,
            objectness=nodes.add("Pow", slice_axis(nodes, table, 0, 1, axis=2), nodes.floats(0.6)),
            one_class_per_anchor=True,
        )

    def _boxes(self, nodes: NodeBuilder, table: str, chosen: str, count: int) -> str:
        cells = make_cell_table(self.width_px, self.height_px, (STRIDE_PX,))[:, :2]
        columns, rows = compute_grid(self.width_px, self.height_px, STRIDE_PX)
        place = nodes.add("Gather", nodes.constant(cells), chosen, axis=0)
        boxes = nodes.gather_rows(slice_axis(nodes, table, 1, 5, axis=2), chosen, count, 4)
        away = nodes.add("Tanh", slice_axis(nodes, boxes, 0, 2, axis=2))
        stride = nodes.floats(self.width_px / columns, self.height_px / rows)
        size = nodes.add("Sigmoid", slice_axis(nodes, boxes, 2, 4, axis=2))
        return to_corners(
            nodes,
            nodes.add("Mul", nodes.add("Add", place, away), stride),
            nodes.add("Mul", size, nodes.constant(np.array([self.width_px, self.height_px], np.float32))),
        )


@dataclass(frozen=True, slots=True)
class FastestDet:
    """FastestDet: BGR from 0 to 1, stretched."""

    name: str = "fastestdet"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the one map joins a sigmoid, a box and a softmax."""
        found = _find_map(signature)
        if found is None:
            return None
        picture, output, classes = found
        has_weights = signature.output_ops[output.name].has_weights
        preprocess, preprocess_evidence = choose_preprocess(signature, picture, FASTESTDET_INPUT)
        return ModelInterpretation(
            head=self.name,
            input=picture,
            preprocess=preprocess,
            decoder=FastestDetDecoder(output.name, classes, picture.width_px, picture.height_px),
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"one map at stride {STRIDE_PX}, a box and {classes} classes for each cell",
                "it joins a sigmoid, a box and a softmax" if has_weights else "as many classes as are named",
                *preprocess_evidence,
            ),
        )


HEADS = (FastestDet(),)


def _find_map(signature: ModelSignature) -> tuple[NetworkInput, TensorInfo, int] | None:
    """The picture, the map and its number of classes."""
    picture = find_picture_input(signature)
    if picture is None or len(signature.inputs) != 1 or len(signature.outputs) != 1:
        return None
    (output,) = signature.outputs
    shape, output_ops = output.shape, signature.output_ops.get(output.name)
    if shape is None or len(shape) != 4 or output_ops is None or not output.dtype.startswith("float"):
        return None
    columns, rows = compute_grid(picture.width_px, picture.height_px, STRIDE_PX)
    if shape[2:] != (rows, columns) or not shape[1] or shape[1] < 6:
        return None
    classes = shape[1] - 5
    names = read_class_names(signature.metadata)
    known = len(names) == classes if names is not None else classes == 80
    if (names is not None and not known) or not (
        output_ops.parts == _CONCAT_PARTS or (not output_ops.has_weights and known)
    ):
        return None
    return picture, output, classes
