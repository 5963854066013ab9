"""YOLOX, and YOLOv6 which shares its shape: [N, cells, 5 + classes], centre, size, objectness, classes.

A YOLOX is raw (offsets from its cell, in strides) or decoded. A YOLOv6 is decoded, and its objectness is a
column of ones. Only the last nodes distinguish the three.
"""

from dataclasses import dataclass

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature
from visionedge.model.decoding import (
    CellGrid,
    DenseDecoder,
    DenseTable,
    find_dense_table,
    find_strides,
)
from visionedge.model.interpretation import ModelInterpretation, Preprocess
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import YOLO_INPUT, interpret, is_detector

YOLOX_INPUT = Preprocess("bgr", 1.0, fit="letterbox", anchor="top-left", pad=114, rounding="down")


@dataclass(frozen=True, slots=True)
class YoloX:
    """YOLOX: BGR of 0-255 at the top left of a letterbox."""

    name: str = "yolox"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there is a row for each cell and the last nodes are those of YOLOX.

        Raises:
            ModelError: it subtracts a mean, so it is an early YOLOX, whose colour order is unknown.
        """
        found = _find_cells(signature)
        if found is None:
            return None
        table, cells = found
        raw = not (table.output_ops.has_arithmetic and table.output_ops.has_weights)
        if raw and table.output_ops.has_weights and not _is_raw(signature, table, cells):
            return None
        if not raw and (table.output_ops.has_constant or "Exp" not in table.output_ops.operators):
            return None
        if any(signature.input_ops.offset) and "visionedge.input" not in signature.metadata:
            raise ModelError(
                "is a YOLOX that subtracts a mean itself, as the first ones did, so its colour order is"
                " unknown; state input.color in MODEL.yaml beside it",
                state=("input: {color: rgb}   # or bgr",),
            )
        return interpret(
            self.name,
            signature,
            table.picture,
            DenseDecoder(table.output.name, table.rows, table.width - 5, True, cells=cells if raw else None),
            YOLOX_INPUT,
            class_count=table.width - 5,
            needs_nms=True,
            evidence=(
                f"{table.rows} rows are the cells at strides {_format_strides(cells)}",
                "no node decodes the boxes yet" if raw else "its last nodes decode the boxes",
            ),
        )


@dataclass(frozen=True, slots=True)
class YoloV6:
    """YOLOv6: the preprocessing of YOLOv5."""

    name: str = "yolov6"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there is a decoded row per cell, with a constant as the objectness."""
        found = _find_cells(signature)
        if found is None:
            return None
        table, cells = found
        output_ops = table.output_ops
        decoded = output_ops.has_weights and output_ops.has_arithmetic and "Exp" not in output_ops.operators
        if not decoded or not output_ops.has_constant:
            return None
        return interpret(
            self.name,
            signature,
            table.picture,
            DenseDecoder(table.output.name, table.rows, table.width - 5, True),
            YOLO_INPUT,
            class_count=table.width - 5,
            needs_nms=True,
            evidence=(
                f"{table.rows} rows are the cells at strides {_format_strides(cells)}",
                "its last nodes decode the boxes and write a constant as the objectness",
            ),
        )


HEADS = (YoloX(), YoloV6())


def _find_cells(signature: ModelSignature) -> tuple[DenseTable, CellGrid] | None:
    """A table with a row for each cell and scores of a sigmoid, and its grid."""
    table = find_dense_table(signature)
    if table is None:
        return None
    size = (table.picture.width_px, table.picture.height_px)
    strides = find_strides(table.rows, *size)
    scored = "Sigmoid" in table.output_ops.operators or not table.output_ops.has_weights
    if strides is None or table.width < 6 or not scored:
        return None
    return (table, CellGrid(*size, strides)) if is_detector(signature, table.width - 5) else None


def _is_raw(signature: ModelSignature, table: DenseTable, cells: CellGrid) -> bool:
    """Whether boxes come first, and the column behind them is an objectness.

    Without a sigmoid of its own, and without a known number of classes, that column may be the first class of
    a family without an objectness.
    """
    known = table.width - 5 == 80 or count_class_names(signature.metadata) > 0
    has_own_sigmoid = table.output_ops.sigmoid_count == 2 * len(cells.strides_px)
    return table.output_ops.parts[:1] == ("Conv",) and (known or has_own_sigmoid)


def _format_strides(cells: CellGrid) -> str:
    return ", ".join(str(stride) for stride in cells.strides_px)
