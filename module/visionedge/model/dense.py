"""Detectors that give one table, a row (or a column) for each anchor: box, perhaps objectness, classes."""

from collections.abc import Mapping
from dataclasses import dataclass

from visionedge.model.analysis.output_ops import Closing
from visionedge.model.analysis.signature import Signature, Tensor
from visionedge.model.decoding import best_rows
from visionedge.model.grids import columns_rows_strides, part, to_corners
from visionedge.model.interpretation import NetworkInput, Preprocess, Reading, picture_input
from visionedge.model.nodes import Nodes
from visionedge.model.preprocessing import prepared


@dataclass(frozen=True, slots=True)
class Cells:
    """The grid of undecoded boxes: centres in strides from their cell, sizes as logarithms of strides."""

    width_px: int
    height_px: int
    strides_px: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DenseDecoder:
    """Decodes [N, anchors, 4 (+ 1) + classes], or [N, 4 (+ 1) + classes, anchors] if `columns`.

    A box is a centre and a size in input pixels, or relative to `cells`; with `corners` it is two corners.
    `objectness`: the fifth number is a factor to the classes' scores. All scores went through a sigmoid
    already.
    """

    output: str
    anchors: int
    classes: int
    objectness: bool
    columns: bool = False
    cells: Cells | None = None
    corners: bool = False

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The best rows, each anchor as its best class; boxes are decoded only for the chosen anchors."""
        table = nodes.cast(self.output, "float32")
        if self.columns:
            table = nodes.add("Transpose", table, perm=[0, 2, 1])
        first = 5 if self.objectness else 4
        boxes = part(nodes, table, 0, 4, axis=2)
        return best_rows(
            nodes,
            part(nodes, table, first, first + self.classes, axis=2),
            lambda chosen, count: self._boxes(nodes, boxes, chosen, count),
            anchors=self.anchors,
            classes=self.classes,
            limit=limit,
            objectness=part(nodes, table, 4, 5, axis=2) if self.objectness else None,
            one_class=True,
        )

    def _boxes(self, nodes: Nodes, table: str, chosen: str, count: int) -> str:
        boxes = nodes.pick(table, chosen, count, 4)
        if self.corners:
            return boxes
        centres, sizes = part(nodes, boxes, 0, 2, axis=2), part(nodes, boxes, 2, 4, axis=2)
        if self.cells is not None:
            grid = columns_rows_strides(self.cells.width_px, self.cells.height_px, self.cells.strides_px)
            place = nodes.add("Gather", nodes.constant(grid[:, :2]), chosen, axis=0)
            stride = nodes.add("Gather", nodes.constant(grid[:, 2:]), chosen, axis=0)
            centres = nodes.add("Mul", nodes.add("Add", centres, place), stride)
            sizes = nodes.add("Mul", nodes.add("Exp", sizes), stride)
        return to_corners(nodes, centres, sizes)


@dataclass(frozen=True, slots=True)
class Table:
    """A model of one picture and one output [N, `rows`, `width`], and what its last nodes did."""

    picture: NetworkInput
    output: Tensor
    rows: int
    width: int
    closing: Closing


def table_of(signature: Signature, beside: int | None = None) -> Table | None:
    """The table that a model gives, None if it gives anything else.

    Outputs of `beside` dimensions next to it are let pass: those that it was made of.
    """
    picture = picture_input(signature)
    tables = [t for t in signature.outputs if t.shape is None or len(t.shape) != beside]
    if picture is None or len(signature.inputs) != 1 or len(tables) != 1:
        return None
    (output,) = tables
    if output.shape is None or len(output.shape) != 3 or not output.dtype.startswith("float"):
        return None
    _, rows, width = output.shape
    if not rows or not width:
        return None
    return Table(picture, output, rows, width, signature.closings.get(output.name, Closing()))


def dense_reading(
    name: str,
    signature: Signature,
    table: Table,
    decoder: DenseDecoder,
    *,
    family: Preprocess,
    evidence: tuple[str, ...],
) -> Reading:
    """The reading of a dense table, prepared as its family is unless the model says otherwise."""
    way, ways = prepared(signature, table.picture, family)
    stated = ("its metadata states the head",) if signature.metadata.get("visionedge.head") == name else ()
    return Reading(
        head=name,
        input=table.picture,
        preprocess=way,
        decoder=decoder,
        class_count=decoder.classes,
        suppress=True,
        evidence=(*stated, *evidence, *ways),
    )
