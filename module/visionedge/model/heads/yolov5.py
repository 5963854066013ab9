"""YOLOv5 and YOLOv7 (and Ultralytics' YOLOv3): [N, 3 to a cell, 5 + classes], decoded to input pixels."""

from dataclasses import dataclass

from visionedge.model.analysis.signature import Signature
from visionedge.model.decoding import DenseDecoder, Table, dense_reading, grid, pyramid, table_of
from visionedge.model.interpretation import Reading
from visionedge.model.preprocessing import YOLO_INPUT, detects, origin

_ANCHORS = 3
# What leaves the scores as a sigmoid made them, beside boxes that are computed.
_SCORES = frozenset({"Sigmoid", "Slice", "Split"})


@dataclass(frozen=True, slots=True)
class YoloV5:
    """The YOLOs with three anchors to a cell and an objectness; the raw maps may come along as outputs."""

    name: str = "yolov5"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where there are three rows for each cell, and the last nodes decode them."""
        table = table_of(signature, beside=5)
        if table is None or table.width < 6:
            return None
        size = (table.picture.width_px, table.picture.height_px)
        strides = pyramid(table.rows, *size, each=_ANCHORS)
        if strides is None or not _decoded(table, len(strides)) or not detects(signature, table.width - 5):
            return None
        if not _maps_belong(signature, table, strides):
            return None
        return dense_reading(
            self.name,
            signature,
            table,
            DenseDecoder(table.output.name, table.rows, table.width - 5, objectness=True),
            family=YOLO_INPUT,
            evidence=(
                f"{table.rows} rows are 3 for each cell at strides {', '.join(map(str, strides))}",
                "its last nodes decode the boxes",
                *origin(signature),
            ),
        )


HEADS = (YoloV5(),)


def _decoded(table: Table, scales: int) -> bool:
    """Whether the last nodes decode boxes and put one stretch of scores behind them, for all or each scale.

    Landmarks or key points behind the boxes would be more stretches.
    """
    closing = table.closing
    if "Sigmoid" not in closing.operators:
        return True  # nothing to see; what is no score shows when it runs
    if not closing.computes:
        return False
    scores = sum(maker in _SCORES for maker in closing.parts)
    return closing.parts == ("ScatterND",) or (scores in (1, scales) and closing.parts[-1] in _SCORES)


def _maps_belong(signature: Signature, table: Table, strides: tuple[int, ...]) -> bool:
    """Whether all other outputs are the maps [N, 3, rows, columns, 5 + classes] that the table is made of."""
    maps = sorted(t.shape[1:] for t in signature.outputs if t.shape is not None and t is not table.output)
    grids = (grid(table.picture.width_px, table.picture.height_px, stride) for stride in strides)
    wanted = sorted((_ANCHORS, rows, columns, table.width) for columns, rows in grids)
    return not maps or maps == wanted
