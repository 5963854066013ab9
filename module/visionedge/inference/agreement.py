"""Whether a variant sees on this very machine what fp32 sees here; asked before `auto` takes it.

Its report was perhaps written on another machine, and integer kernels are not the same everywhere (see
`arithmetic`). So both look at a few pictures of the bundled clip, and what they see is held against each
other as in the report. A model that knows nothing of what is there says too little that way; then the values
that integer kernels give for it are held against those of the same network computed as it is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visionedge.frames import Detections
from visionedge.inference.graph import checked_network
from visionedge.inference.model import Model
from visionedge.inference.parity import LEAST_BOXES, Tolerance, compare
from visionedge.inference.precision import Sample, in_integers
from visionedge.inference.refining import distance_to, outputs_of

MOST_APART = 0.1
"""Of how much the values vary: kernels that keep all bits stay far below, those that cut off above."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was found, in a clause, and why the variant must not be used here; None where it may."""

    words: str
    refusal: str | None = None


def agreement(
    fp32: Sequence[Detections],
    variant: Sequence[Detections],
    tolerance: Tolerance,
    apart: Callable[[], float | None],
) -> Agreement:
    """Judge what both saw on the same pictures; where that is too little, `apart` is asked (`apart_here`)."""
    parity = compare(fp32, variant)
    if parity.boxes >= LEAST_BOXES:
        words = f"{parity.matched:.0%} of {parity.boxes} boxes agree here"
        return Agreement(words, parity.refusal(tolerance))
    away = apart()
    if away is None:
        return Agreement("floats round alike everywhere, so its report counts")
    if away <= MOST_APART:
        return Agreement(f"its integer kernels are within {away:.3f} of exact here")
    return Agreement("", f"the integer kernels here are {away:.2f} off, {MOST_APART} are allowed")


def apart_here(model: Model, samples: Sequence[Sample]) -> float | None:
    """How far this CPU's integer kernels take a network's own outputs from what is written in it.

    In parts of how much they vary; None for a network without integers. Raises what onnxruntime raises.
    """
    network, images = checked_network(model), [sample.image for sample in samples]
    if not in_integers(network):
        return None
    exact = outputs_of(network, model.reading, images, exact=True)
    return distance_to(exact)(outputs_of(network, model.reading, images))
