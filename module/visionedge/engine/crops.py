"""Parts of pictures, computed by a second model: what it says of each."""

import math
from collections.abc import Sequence

import numpy as np

from visionedge.config.label_keys import NO_ANSWER
from visionedge.engine.device.faults import EngineError
from visionedge.engine.lanes import EngineWithSelection
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Picture, Placement, label_of
from visionedge.model.postprocess import Rows


def cut_crop(picture: Picture, corners: tuple[float, float, float, float]) -> Picture:
    """The part of a picture between left, top, right and bottom (0-1), a view of at least one pixel."""
    height_px, width_px = picture.shape[:2]
    left, top, right, bottom = corners
    first_x, first_y = min(int(left * width_px), width_px - 1), min(int(top * height_px), height_px - 1)
    last_x, last_y = math.ceil(right * width_px), math.ceil(bottom * height_px)
    return picture[first_y : max(first_y + 1, last_y), first_x : max(first_x + 1, last_x)]


def answer_crops(running: EngineWithSelection, crops: Sequence[Picture]) -> list[str | None]:
    """The label of each crop, computed as one batch, on the calling thread.

    A classifier gives its best label, or None below the confidence. A detector gives the label of its best
    detection, or `NO_ANSWER`.

    Raises:
        EngineError: the engine failed on them, or gave another number of results.
    """
    fitted = [fit_to_input(np.ascontiguousarray(crop), running.spec) for crop in crops]
    rows = running.engine.infer([picture for picture, _ in fitted], running.selection.confidence).rows
    if len(rows) != len(crops):
        raise EngineError(f"the engine gave {len(rows)} results for {len(crops)} crops")
    return [_answer(running, found, place) for found, (_, place) in zip(rows, fitted, strict=True)]


def _answer(running: EngineWithSelection, rows: Rows, placement: Placement) -> str | None:
    model, selection = running.model, running.selection
    if not model.is_classifier:
        found = selection.apply(rows, placement)
        return label_of(model.labels, int(found.class_ids[0])) if len(found) else NO_ANSWER
    is_sure = len(rows) > 0 and bool(rows[0, 4] >= np.float32(selection.confidence))
    return label_of(model.labels, int(rows[0, 5])) if is_sure else None
