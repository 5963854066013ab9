"""Whether a variant sees on this very machine what fp32 sees here; asked before `auto` takes it.

Its report was perhaps written on another machine, and integer kernels are not the same everywhere (see
`arithmetic`). So both look at a few pictures of the bundled clip, and what they see is held against each
other as in the report. A model that knows nothing of what is there says too little that way; then the values
that integer kernels give for it are held against those of the same network computed as it is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visionedge.frames.types import Detections
from visionedge.model.compiler.compile import checked_network
from visionedge.model.model import Model
from visionedge.model.parity import LEAST_BOXES, SMALL_IOU, Tolerance, compare
from visionedge.model.quantization.int8 import distance_to, outputs_of
from visionedge.model.quantization.search import Sample, in_integers


@dataclass(frozen=True, slots=True)
class Apart:
    """How far a network's own outputs lie apart, in parts of how much they vary.

    `written`: a network in integers, computed as it is written, from the one in floats, which is what its
    report was judged by. `kernels`: what this processor's integer kernels make of it, from that.
    """

    written: float
    kernels: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was found, in a clause, and why the variant must not be used here; None where it may."""

    words: str
    refusal: str | None = None


def agreement(
    fp32: Sequence[Detections],
    variant: Sequence[Detections],
    tolerance: Tolerance,
    apart: Callable[[], Apart | None],
) -> Agreement:
    """Judge what both saw on the same pictures; where that is too little, `apart` is asked (`apart_here`)."""
    parity = compare(fp32, variant, iou=SMALL_IOU)
    if parity.boxes >= LEAST_BOXES:
        words = f"{parity.matched:.0%} of {parity.boxes} boxes agree here"
        return Agreement(words, parity.refusal(tolerance.on_other_pictures()))
    away = apart()
    if away is None:
        return Agreement("floats round alike everywhere, so its report counts")
    if away.kernels <= away.written:
        return Agreement(
            f"the kernels here add {away.kernels:.3f} to the {away.written:.3f} that integers cost"
        )
    return Agreement(
        "", f"the integer kernels here add {away.kernels:.2f} to the {away.written:.2f} that integers cost"
    )


def apart_here(fp32: Model, variant: Model, samples: Sequence[Sample]) -> Apart | None:
    """How far the integers of a variant, and this CPU's kernels for them, take it away; None without any.

    Raises what onnxruntime raises.
    """
    network, images = checked_network(variant), [sample.image for sample in samples]
    if not in_integers(network):
        return None
    exact = outputs_of(network, variant.reading, images, exact=True)
    floats = outputs_of(checked_network(fp32), fp32.reading, images)
    own = outputs_of(network, variant.reading, images)
    return Apart(distance_to(floats)(exact), distance_to(exact)(own))
