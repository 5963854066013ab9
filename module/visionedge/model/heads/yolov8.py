"""YOLOv8, v9, v11, v12 and their kin: [N, 4 + classes, cells], decoded to input pixels, no objectness."""

from dataclasses import dataclass, replace

from visionedge.model.analysis.output_ops import Closing
from visionedge.model.analysis.signature import Signature
from visionedge.model.decoding import DenseDecoder, Table, dense_reading, pyramid, table_of
from visionedge.model.interpretation import Reading
from visionedge.model.labels import class_names
from visionedge.model.preprocessing import YOLO_INPUT, detects, origin

# A turned box is decoded with them, a list that was chosen already comes from the others.
_FOREIGN = frozenset({"Cos", "Sin", "Exp", "TopK", "NonMaxSuppression"})


@dataclass(frozen=True, slots=True)
class YoloV8:
    """The YOLOs without anchors and without objectness, one column (or one row) for each cell."""

    name: str = "yolov8"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where one side of the table counts the cells and the last nodes decode boxes."""
        table = table_of(signature)
        if table is None:
            return None
        if table.closing.operators & _FOREIGN or not _decoded(table.closing):
            return None
        ways = _ways(signature, table)
        if len(ways) != 1:
            return None
        columns, cells, classes, strides = ways[0]
        corners = table.closing.form == "corners"
        reading = dense_reading(
            self.name,
            signature,
            table,
            DenseDecoder(
                table.output.name, cells, classes, objectness=False, columns=columns, corners=corners
            ),
            family=YOLO_INPUT,
            evidence=(
                f"{cells} {'columns' if columns else 'rows'} are the cells at strides "
                f"{', '.join(map(str, strides))}",
                "its last nodes are those of a decoded table without an objectness"
                f"{', of corners' if corners else ''}",
                *origin(signature),
            ),
        )
        if not signature.metadata.get("model_family", "").endswith("_e2e"):
            return reading
        clause = "its metadata says that each thing is found by one cell: boxes are not suppressed"
        return replace(reading, suppress=False, evidence=(*reading.evidence, clause))


HEADS = (YoloV8(),)


def _ways(signature: Signature, table: Table) -> list[tuple[bool, int, int, tuple[int, ...]]]:
    """(whether columns are cells, how many, classes, strides) for each side of the table that fits."""
    size = (table.picture.width_px, table.picture.height_px)
    return [
        (columns, cells, width - 4, strides)
        for columns, cells, width in ((True, table.width, table.rows), (False, table.rows, table.width))
        if (strides := pyramid(cells, *size)) is not None
        and detects(signature, width - 4)
        and (columns or _rows_for_sure(signature, table.closing, width - 4))
    ]


def _rows_for_sure(signature: Signature, closing: Closing, classes: int) -> bool:
    """Whether a row for each cell cannot have an objectness: its nodes or the number of its classes tell."""
    return "Sigmoid" in closing.operators or classes == 80 or class_names(signature.metadata) is not None


def _decoded(closing: Closing) -> bool:
    """Whether boxes are decoded and only scores follow them: no angle, no masks, no key points."""
    if "Sigmoid" not in closing.operators:
        return True  # nothing to see; what is no score shows when it runs
    scores = closing.parts.count("Sigmoid") == 1 and closing.parts[-1] == "Sigmoid"
    return scores and closing.computes and not closing.has_constant
