"""YOLOX, and YOLOv6 which shares its shape: [N, cells, 5 + classes], centre, size, objectness, classes.

YOLOX comes raw (offsets from its cell, in strides) or decoded; YOLOv6 is decoded, its objectness a column of
ones. Nothing but the last nodes tells the three from each other.
"""

from dataclasses import dataclass

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import Signature
from visionedge.model.decoding import Cells, DenseDecoder, Table, dense_reading, pyramid, table_of
from visionedge.model.interpretation import Preprocess, Reading
from visionedge.model.labels import class_names
from visionedge.model.preprocessing import YOLO_INPUT, detects

YOLOX_INPUT = Preprocess("bgr", 1.0, fit="letterbox", anchor="top-left", pad=114, rounding="down")


@dataclass(frozen=True, slots=True)
class YoloX:
    """YOLOX: BGR of 0-255 at the top left of a letterbox."""

    name: str = "yolox"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where there is a row for each cell and the last nodes are those of YOLOX.

        Raises:
            ModelError: it subtracts a mean by itself, so it is one whose order of colours is not known.
        """
        found = _cells(signature)
        if found is None:
            return None
        table, cells = found
        raw = not (table.closing.computes and table.closing.weighted)
        if raw and table.closing.weighted and not _is_raw(signature, table, cells):
            return None
        if not raw and (table.closing.has_constant or "Exp" not in table.closing.operators):
            return None
        if any(signature.opening.offset) and "visionedge.input" not in signature.metadata:
            raise ModelError(
                "is a YOLOX that subtracts a mean by itself, as the first ones did, so the order of its "
                "colours is not known; state input.color in MODEL.yaml beside it",
                state=("input: {color: rgb}   # or bgr",),
            )
        return dense_reading(
            self.name,
            signature,
            table,
            DenseDecoder(table.output.name, table.rows, table.width - 5, True, cells=cells if raw else None),
            family=YOLOX_INPUT,
            evidence=(
                f"{table.rows} rows are the cells at strides {_words(cells)}",
                "no node decodes the boxes yet" if raw else "its last nodes decode the boxes",
            ),
        )


@dataclass(frozen=True, slots=True)
class YoloV6:
    """YOLOv6: prepared as YOLOv5 is."""

    name: str = "yolov6"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where there is a row for each cell, decoded, and a constant beside boxes and scores."""
        found = _cells(signature)
        if found is None:
            return None
        table, cells = found
        closing = table.closing
        decoded = closing.weighted and closing.computes and "Exp" not in closing.operators
        if not decoded or not closing.has_constant:
            return None
        return dense_reading(
            self.name,
            signature,
            table,
            DenseDecoder(table.output.name, table.rows, table.width - 5, True),
            family=YOLO_INPUT,
            evidence=(
                f"{table.rows} rows are the cells at strides {_words(cells)}",
                "its last nodes decode the boxes and put a constant for the objectness",
            ),
        )


HEADS = (YoloX(), YoloV6())


def _cells(signature: Signature) -> tuple[Table, Cells] | None:
    """A table of one row for each cell whose scores went through a sigmoid, and its grid."""
    table = table_of(signature)
    if table is None:
        return None
    size = (table.picture.width_px, table.picture.height_px)
    strides = pyramid(table.rows, *size)
    scored = "Sigmoid" in table.closing.operators or not table.closing.weighted
    if strides is None or table.width < 6 or not scored:
        return None
    return (table, Cells(*size, strides)) if detects(signature, table.width - 5) else None


def _is_raw(signature: Signature, table: Table, cells: Cells) -> bool:
    """Whether boxes come first, and the objectness by itself or the number of classes is known.

    Else the column behind the box may be the first class of a family without an objectness.
    """
    classes = table.width - 5
    known = classes == 80 or class_names(signature.metadata) is not None
    apart = table.closing.sigmoids == 2 * len(cells.strides_px)
    return table.closing.parts[:1] == ("Conv",) and (known or apart)


def _words(cells: Cells) -> str:
    return ", ".join(str(stride) for stride in cells.strides_px)
