"""YOLOv8, v9, v11, v12 and their kin: [N, 4 + classes, cells], decoded to input pixels, no objectness."""

from dataclasses import dataclass

from visionedge.inference.dense import DenseDecoder, dense_reading, table_of
from visionedge.inference.grids import pyramid
from visionedge.inference.reading import Reading
from visionedge.inference.signature import Signature
from visionedge.inference.ultralytics import YOLO_INPUT, detects, origin

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
        closing = table.closing
        decoded = closing.parts[-1:] == ("Sigmoid",) and closing.computes and not closing.has_constant
        if not decoded or closing.parts.count("Sigmoid") > 1 or closing.operators & _FOREIGN:
            return None
        size = (table.picture.width_px, table.picture.height_px)
        ways = [
            (columns, cells, width - 4, strides)
            for columns, cells, width in ((True, table.width, table.rows), (False, table.rows, table.width))
            if (strides := pyramid(cells, *size)) is not None and detects(signature, width - 4)
        ]
        if len(ways) != 1:
            return None
        columns, cells, classes, strides = ways[0]
        return dense_reading(
            self.name,
            signature,
            table,
            DenseDecoder(table.output.name, cells, classes, objectness=False, columns=columns),
            family=YOLO_INPUT,
            evidence=(
                f"{cells} {'columns' if columns else 'rows'} are the cells at strides "
                f"{', '.join(map(str, strides))}",
                "its last nodes decode the boxes and end the scores in a sigmoid",
                *origin(signature),
            ),
        )


HEADS = (YoloV8(),)
