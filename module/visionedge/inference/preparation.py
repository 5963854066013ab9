"""How a picture is prepared: as the model's family has it, unless the model or its owner says otherwise."""

from dataclasses import replace

import numpy as np

from visionedge.errors import ModelError
from visionedge.frames import Anchor
from visionedge.inference.opening import Opening
from visionedge.inference.reading import NetworkInput, Preprocess, stated_object, stated_preprocess
from visionedge.inference.signature import Signature

_HINT = "state input in MODEL.yaml beside it"


def prepared(
    signature: Signature, picture: NetworkInput, family: Preprocess
) -> tuple[Preprocess, tuple[str, ...]]:
    """The preparation of a model of a family, and the evidence for it.

    What is stated (``visionedge.input``, `MODEL.yaml`) wins; then what the first nodes of the network do;
    then the family's own way.

    Raises:
        ModelError: the first nodes contradict the family and nothing is stated.
    """
    stated = stated_object(signature, "visionedge.input")
    way, evidence = family, list[str]()
    if not {"scale", "mean", "std"} & set(stated):
        way, evidence = _adapted(signature.opening, picture, family)
    if signature.opening.swaps and "color" not in stated:
        way = replace(way, color="bgr" if way.color == "rgb" else "rgb")
        evidence.append("it swaps red and blue by itself")
    if (
        way.fit == "letterbox"
        and "anchor" not in stated
        and (said := signature.metadata.get("letterbox_pad"))
    ):
        way = replace(way, anchor=_anchor(said))
        evidence.append(f"its metadata 'letterbox_pad' says {said}")
    if stated:
        evidence.append(f"stated outright: {', '.join(sorted(stated))}")
    evidence.append(f"takes {way.color.upper()}, {way.fit}")
    return stated_preprocess(signature, way), tuple(evidence)


def _anchor(said: str) -> Anchor:
    """Where a picture lies by the key that exporters of LibreYOLO write."""
    anchors: dict[str, Anchor] = {"topleft": "top-left", "center": "center"}
    if said not in anchors:
        raise ModelError(f"its metadata 'letterbox_pad' says {said[:40]!r}, which is no place known; {_HINT}")
    return anchors[said]


def _adapted(opening: Opening, picture: NetworkInput, family: Preprocess) -> tuple[Preprocess, list[str]]:
    if not opening.scales:
        if picture.dtype == "uint8":
            return _plain(family, 255), ["takes bytes"]
        return family, ["colour and scaling as its family has them"]
    top = _range(opening)
    if top is None or (top == 1 and picture.dtype == "uint8"):
        raise ModelError(
            f"its first nodes scale the picture by {_short(opening.factor)} and add {_short(opening.offset)},"
            f" which fits neither pixels of 0-255 nor of 0-1; {_HINT}"
        )
    wanted = any(family.mean) and family.scale < 1
    if wanted and not any(opening.offset):
        raise ModelError(
            f"its first nodes scale the picture by {_short(opening.factor)} but subtract no mean, as its"
            f" family needs; {_HINT}"
        )
    return _plain(family, top), [f"normalises by itself: takes pixels of 0-{top}"]


def _plain(family: Preprocess, top: int) -> Preprocess:
    """Pixels of 0 to `top` and no more."""
    return replace(family, scale=top / 255, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _range(opening: Opening) -> int | None:
    """The range of pixels, 255 or 1, that the opening brings to what networks compute with."""
    factor, offset = np.array(opening.factor), np.array(opening.offset)
    if (np.abs(factor - 1) < 0.1).all() and (offset < -20).all():
        return 255  # a mean is subtracted from pixels, and no more
    for top in (255, 1):
        width = factor * top
        if (width >= 0.5).all() and (width <= 12).all() and (np.abs(offset) <= 6).all():
            return top
    return None


def _short(values: tuple[float, float, float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
