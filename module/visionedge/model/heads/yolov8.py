"""YOLOv8, v9, v11, v12 and similar: [N, 4 + classes, cells], decoded to input pixels, no objectness."""

from dataclasses import dataclass, replace

from visionedge.model.analysis.output_ops import OutputOps
from visionedge.model.analysis.signature import ModelSignature
from visionedge.model.decoding import (
    DenseDecoder,
    DenseTable,
    find_dense_table,
    find_strides,
)
from visionedge.model.exporter_files import PADDLE_KEY, make_paddle_preprocess_error, parse_paddle_preprocess
from visionedge.model.interpretation import ModelInterpretation, Preprocess, states_scaling
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import YOLO_INPUT, describe_exporter, interpret, is_detector

# Rotated boxes are decoded with Cos, Sin and Exp; TopK and NonMaxSuppression make a finished list.
_FOREIGN_OPERATORS = frozenset({"Cos", "Sin", "Exp", "TopK", "NonMaxSuppression"})


@dataclass(frozen=True, slots=True)
class YoloV8:
    """The YOLOs without anchors and objectness, with one column (or one row) per cell."""

    name: str = "yolov8"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if one side of the table counts the cells and the last nodes decode boxes."""
        table = find_dense_table(signature)
        if table is None:
            return None
        if table.output_ops.operators & _FOREIGN_OPERATORS or not _is_decoded(table.output_ops):
            return None
        ways = _find_layouts(signature, table)
        if len(ways) != 1:
            return None
        columns, cells, classes, strides = ways[0]
        corners = table.output_ops.box_encoding == "corners"
        family, family_evidence = _choose_family_preprocess(signature, table)
        end_to_end = signature.metadata.get("model_family", "").endswith("_e2e")
        clause = "its metadata says that one cell finds each object: boxes are not suppressed"
        return interpret(
            self.name,
            signature,
            table.picture,
            DenseDecoder(
                table.output.name, cells, classes, objectness=False, columns=columns, corners=corners
            ),
            family,
            class_count=classes,
            needs_nms=not end_to_end,
            evidence=(
                f"{cells} {'columns' if columns else 'rows'} are the cells at strides "
                f"{', '.join(map(str, strides))}",
                "its last nodes are those of a decoded table without an objectness"
                f"{', of corners' if corners else ''}",
                *describe_exporter(signature),
                *family_evidence,
                *((clause,) if end_to_end else ()),
            ),
        )


HEADS = (YoloV8(),)


def _choose_family_preprocess(
    signature: ModelSignature, table: DenseTable
) -> tuple[Preprocess, tuple[str, ...]]:
    """The preprocessing in training, and its evidence: a PP-YOLOE without its last nodes has the same table.

    Raises:
        ModelError: it is a PP-YOLOE whose preprocessing is unknown or unsupported.
    """
    if table.output_ops.box_encoding != "corners" or not signature.producer.lower().startswith("paddle"):
        return YOLO_INPUT, ()
    if states_scaling(signature):
        return replace(YOLO_INPUT, fit="stretch"), ("Paddle made it, and its scaling is stated",)
    if (preprocess := parse_paddle_preprocess(signature, table.picture)) is not None:
        return preprocess, (f"Paddle made it, and {PADDLE_KEY} beside it says how pictures are prepared",)
    raise make_paddle_preprocess_error()


def _find_layouts(
    signature: ModelSignature, table: DenseTable
) -> list[tuple[bool, int, int, tuple[int, ...]]]:
    """(whether columns are cells, how many, classes, strides) for each side of the table that fits."""
    size = (table.picture.width_px, table.picture.height_px)
    return [
        (columns, cells, width - 4, strides)
        for columns, cells, width in ((True, table.width, table.rows), (False, table.rows, table.width))
        if (strides := find_strides(cells, *size)) is not None
        and is_detector(signature, width - 4)
        and (columns or _has_no_objectness(signature, table.output_ops, width - 4))
    ]


def _has_no_objectness(signature: ModelSignature, output_ops: OutputOps, classes: int) -> bool:
    """Whether a row per cell has no objectness, by its nodes or by the number of its classes."""
    return "Sigmoid" in output_ops.operators or classes == 80 or count_class_names(signature.metadata) > 0


def _is_decoded(output_ops: OutputOps) -> bool:
    """Whether boxes are decoded and only scores follow them: no angle, no masks, no key points."""
    if "Sigmoid" not in output_ops.operators:
        return True  # not visible in the graph; scores outside 0…1 are found in the trial run
    scores = output_ops.parts.count("Sigmoid") == 1 and output_ops.parts[-1] == "Sigmoid"
    return scores and output_ops.has_arithmetic and not output_ops.has_constant
