"""A network whose graph resizes its picture first: boxes in pixels of what it resized to, scaled back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import Signature, Tensor
from visionedge.model.graph import Nodes
from visionedge.model.interpretation import Decoder, Reading, picture_input

# Their boxes are parts of the picture, or pixels of their input, whatever happens to it inside.
_RESIZE_THEMSELVES = frozenset({"compiled", "detectron2", "efficientdet", "mmdeploy", "tfod", "torchvision"})
_SAME_RATIO = 1e-3


@dataclass(frozen=True, slots=True)
class ResizedDecoder:
    """Another decoder, whose boxes are multiplied by `factors` (x, y)."""

    decoder: Decoder
    factors: tuple[float, float]

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:
        """As the other decoder has it."""
        return self.decoder.feeds(nodes, pictures)

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The rows of the other decoder, in pixels of the input."""
        return nodes.add("Mul", self.decoder.rows(nodes, limit), nodes.floats(*self.factors * 2, 1.0, 1.0))


def as_resized(signature: Signature, head: str) -> Signature:
    """The signature of the network behind the Resize; itself where there is none."""
    size_px, picture = signature.opening.size_px, picture_input(signature)
    if size_px is None or picture is None or head in _RESIZE_THEMSELVES:
        return signature
    sides = (size_px[1], size_px[0])
    dims = (3, *sides) if picture.layout == "NCHW" else (*sides, 3)
    inputs = tuple(
        Tensor(t.name, t.dtype, (*(t.shape or ())[:1], *dims)) if t.name == picture.name else t
        for t in signature.inputs
    )
    return replace(signature, inputs=inputs)


def resized_back(signature: Signature, reading: Reading) -> Reading:
    """A reading of the network behind the Resize as one of the whole; unchanged where there is none.

    Raises:
        ModelError: its last nodes multiply by such a ratio, so the boxes may have been scaled back already.
    """
    picture = picture_input(signature)
    inner = reading.input
    if picture is None or (picture.width_px, picture.height_px) == (inner.width_px, inner.height_px):
        return reading
    factors = (picture.width_px / inner.width_px, picture.height_px / inner.height_px)
    ratios = [ratio for factor in factors for ratio in (factor, 1 / factor) if ratio != 1]
    seen = {factor for closing in signature.closings.values() for factor in closing.factors}
    shaped = any("Shape" in closing.operators for closing in signature.closings.values())
    if shaped or any(abs(a - b) <= _SAME_RATIO * b for a in seen for b in ratios):
        raise ModelError(
            f"its first nodes resize the picture from {picture.width_px} x {picture.height_px} to"
            f" {inner.width_px} x {inner.height_px}, and its last ones may scale the boxes back or may not;"
            f" export it without the Resize, for pictures of {inner.width_px} x {inner.height_px}",
            state=(),
        )
    clause = f"its graph resizes the picture to {inner.width_px} x {inner.height_px}; boxes are scaled back"
    return replace(
        reading,
        input=replace(inner, width_px=picture.width_px, height_px=picture.height_px),
        decoder=ResizedDecoder(reading.decoder, factors),
        evidence=(*reading.evidence, clause),
    )
