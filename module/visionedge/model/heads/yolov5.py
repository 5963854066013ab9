"""YOLOv5 and YOLOv7 (and Ultralytics' YOLOv3): [N, 3 per cell, 5 + classes], decoded to input pixels."""

from dataclasses import dataclass

from visionedge.model.analysis.signature import ModelSignature
from visionedge.model.decoding import (
    DenseDecoder,
    DenseTable,
    compute_grid,
    find_dense_table,
    find_strides,
)
from visionedge.model.interpretation import ModelInterpretation
from visionedge.model.preprocessing import YOLO_INPUT, describe_exporter, interpret, is_detector

_ANCHORS_PER_CELL = 3
# Operators that pass on the scores of a sigmoid.
_SCORE_OPERATORS = frozenset({"Sigmoid", "Slice", "Split"})


@dataclass(frozen=True, slots=True)
class YoloV5:
    """The YOLOs with three anchors per cell and an objectness; the raw maps can be further outputs."""

    name: str = "yolov5"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if there are three rows for each cell, and the last nodes decode them."""
        table = find_dense_table(signature, beside=5)
        if table is None or table.width < 6:
            return None
        size = (table.picture.width_px, table.picture.height_px)
        strides = find_strides(table.rows, *size, anchors_per_cell=_ANCHORS_PER_CELL)
        if strides is None or not _is_decoded(table, len(strides)):
            return None
        if not is_detector(signature, table.width - 5) or not _are_maps_of_table(signature, table, strides):
            return None
        return interpret(
            self.name,
            signature,
            table.picture,
            DenseDecoder(table.output.name, table.rows, table.width - 5, objectness=True),
            YOLO_INPUT,
            class_count=table.width - 5,
            needs_nms=True,
            evidence=(
                f"{table.rows} rows are 3 for each cell at strides {', '.join(map(str, strides))}",
                "its last nodes decode the boxes",
                *describe_exporter(signature),
            ),
        )


HEADS = (YoloV5(),)


def _is_decoded(table: DenseTable, scales: int) -> bool:
    """Whether the last nodes decode boxes and join them with scores only, once or once per scale.

    Landmarks or key points would be further parts.
    """
    output_ops = table.output_ops
    if "Sigmoid" not in output_ops.operators:
        return True  # not visible in the graph; scores outside 0…1 are found in the trial run
    if not output_ops.has_arithmetic:
        return False
    scores = sum(operator in _SCORE_OPERATORS for operator in output_ops.parts)
    return output_ops.parts == ("ScatterND",) or (
        scores in (1, scales) and output_ops.parts[-1] in _SCORE_OPERATORS
    )


def _are_maps_of_table(signature: ModelSignature, table: DenseTable, strides: tuple[int, ...]) -> bool:
    """Whether all other outputs are the maps [N, 3, rows, columns, 5 + classes] of the table."""
    maps = sorted(t.shape[1:] for t in signature.outputs if t.shape is not None and t is not table.output)
    grids = (compute_grid(table.picture.width_px, table.picture.height_px, stride) for stride in strides)
    wanted = sorted((_ANCHORS_PER_CELL, rows, columns, table.width) for columns, rows in grids)
    return not maps or maps == wanted
