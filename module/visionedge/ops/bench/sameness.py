"""Whether the pipeline sees what the plain loop sees: both look at the same pictures of a clip."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import parse_camera_uri
from visionedge.engine.interface import AnyEngine
from visionedge.frames.types import Detections
from visionedge.model.parity import PARTNER_CONFIDENCE, compare
from visionedge.model.postprocess import Selection
from visionedge.ops.bench.baseline import PlainLoop, clip_of

_EVERY = 10


def sameness(
    source: str, engine: AnyEngine, selection: Selection, plain: PlainLoop, pictures: int = 30
) -> dict[str, Any]:
    """The share of boxes that both see (as `parity.compare` counts them), and how far their scores lie apart.

    They may differ a little: the pipeline brings pictures to the model's size by a shorter way.
    """
    low = replace(selection, confidence=PARTNER_CONFIDENCE)
    shown = islice(plain.pictures(), 0, pictures * _EVERY, _EVERY)
    pairs = list(
        zip((plain.see(picture, low) for picture in shown), _ours(source, engine, low), strict=False)
    )
    parity = compare([theirs for theirs, _ in pairs], [ours for _, ours in pairs])
    return {
        "pictures": parity.pictures,
        "boxes": parity.boxes,
        "matched": round(parity.matched, 4),
        "scoreShift": round(parity.shift, 4),
    }


def _ours(source: str, engine: AnyEngine, selection: Selection) -> Iterator[Detections]:
    with closing(open_source(parse_camera_uri(clip_of(source)))) as played:
        number = 0
        while (decoded := played.read()) is not None:
            if number % _EVERY == 0:
                image, placement = decoded.fill(engine.model.input)
                (rows,) = engine.infer([image], selection.confidence)
                yield selection.apply(rows, placement)
            number += 1
