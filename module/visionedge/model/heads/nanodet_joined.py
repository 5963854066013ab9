"""NanoDet as its own exporter writes it: one table for all scales, [N, cells, classes + 4 * bins].

NanoDet-Plus has four scales, sets its centres at the corner of a cell and stretches its pictures; the first
NanoDets have three, centres in the middle, and keep the shape of pictures.
"""

from dataclasses import dataclass, replace

from visionedge.model.analysis.output_ops import Closing
from visionedge.model.analysis.signature import Signature
from visionedge.model.dense import Table, table_of
from visionedge.model.grids import grid, pyramid
from visionedge.model.heads.nanodet import NANODET_INPUT, DflDecoder, Scale
from visionedge.model.interpretation import Reading
from visionedge.model.labels import class_names
from visionedge.model.preprocessing import prepared

_PYRAMIDS_PX = ((8, 16, 32), (8, 16, 32, 64))
_BINS = range(4, 33)
_RAW = frozenset({"Conv", "Slice", "Split"})


@dataclass(frozen=True, slots=True)
class NanoDetJoined:
    """NanoDet, first and Plus: BGR, the mean taken off."""

    name: str = "nanodet-joined"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where scores of a sigmoid and bins follow each other for each scale, undecoded."""
        table = table_of(signature)
        if table is None:
            return None
        strides = pyramid(table.rows, table.picture.width_px, table.picture.height_px, among=_PYRAMIDS_PX)
        classes = _classes(signature, table)
        if strides is None or classes is None:
            return None
        if not _alternates(table.closing, len(strides)):
            return None
        plus = len(strides) == 4
        family = replace(NANODET_INPUT, fit="stretch" if plus else "letterbox")
        way, ways = prepared(signature, table.picture, family)
        bins = (table.width - classes) // 4
        return Reading(
            head=self.name,
            input=table.picture,
            preprocess=way,
            decoder=DflDecoder(
                _scales(table, strides),
                classes,
                bins,
                sigmoid=False,
                cell_offset=0.0 if plus else 0.5,
                joined=table.output.name,
            ),
            class_count=classes,
            suppress=True,
            evidence=(
                f"{table.rows} rows are the cells at strides {', '.join(map(str, strides))}",
                f"each has {classes} scores of a sigmoid, then 4 x {bins} bins",
                f"{len(strides)} scales, as NanoDet{'-Plus' if plus else ''} has them",
                *ways,
            ),
        )


HEADS = (NanoDetJoined(),)


def _alternates(closing: Closing, scales: int) -> bool:
    """Whether each scale has scores of a sigmoid and then what the weights gave, and nothing is decoded."""
    scores, boxes = closing.parts[::2], closing.parts[1::2]
    return scores == ("Sigmoid",) * scales and len(boxes) == scales and set(boxes) <= _RAW


def _classes(signature: Signature, table: Table) -> int | None:
    """The number of classes: that of its names, or COCO's; None where the rest would be no bins."""
    names = class_names(signature.metadata)
    classes = 80 if names is None else len(names)
    bins, rest = divmod(table.width - classes, 4)
    return classes if bins in _BINS and not rest else None


def _scales(table: Table, strides: tuple[int, ...]) -> tuple[Scale, ...]:
    size = (table.picture.width_px, table.picture.height_px)
    return tuple(Scale("", "", stride, *grid(*size, stride)) for stride in strides)
