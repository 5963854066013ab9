"""FastestDet: one map [N, 5 + classes, h, w] at stride 16: an objectness, a box and classes for each cell.

tanh gives the distance of the centre from the cell, a sigmoid the size relative to the picture. A score is
objectness^0.6 * class^0.4.
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
    find_only_input,
)
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import interpret

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
        has_weights = signature.ops(output).has_weights
        return interpret(
            self.name,
            signature,
            picture,
            FastestDetDecoder(output.name, classes, picture.width_px, picture.height_px),
            FASTESTDET_INPUT,
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"one map at stride {STRIDE_PX}, a box and {classes} classes for each cell",
                "it joins a sigmoid, a box and a softmax" if has_weights else "as many classes as labels",
            ),
        )


HEADS = (FastestDet(),)


def _find_map(signature: ModelSignature) -> tuple[NetworkInput, TensorInfo, int] | None:
    """The picture, the map and its number of classes."""
    picture = find_only_input(signature)
    if picture is None or len(signature.outputs) != 1:
        return None
    (output,) = signature.outputs
    columns, rows = compute_grid(picture.width_px, picture.height_px, STRIDE_PX)
    width, is_map = output.side(1) or 0, output.rank == 4 and output.is_float
    if not is_map or (output.side(2), output.side(3)) != (rows, columns) or width < 6:
        return None
    output_ops, classes = signature.ops(output), width - 5
    named = count_class_names(signature.metadata)
    if named and named != classes:
        return None
    known = classes in (named, 80)
    if output_ops.parts != _CONCAT_PARTS and (output_ops.has_weights or not known):
        return None
    return picture, output, classes
