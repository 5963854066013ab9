"""A network whose graph resizes its picture first: boxes in pixels of what it resized to, scaled back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import Decoder, ModelInterpretation, find_picture_input

# Their boxes are parts of the picture, or pixels of their input, whatever happens to it inside.
_HEADS_WITH_OWN_RESIZE = frozenset(
    {"compiled", "detectron2", "efficientdet", "mmdeploy", "tfod", "torchvision"}
)
_RATIO_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ResizedDecoder:
    """Another decoder, whose boxes are multiplied by `factors` (x, y)."""

    decoder: Decoder
    factors: tuple[float, float]

    def feeds(self, nodes: NodeBuilder, pictures: str) -> Mapping[str, str]:
        """As the other decoder has it."""
        return self.decoder.feeds(nodes, pictures)

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The rows of the other decoder, in pixels of the input."""
        return nodes.add("Mul", self.decoder.rows(nodes, limit), nodes.floats(*self.factors * 2, 1.0, 1.0))


def skip_resize(signature: ModelSignature, head: str) -> ModelSignature:
    """The signature of the network behind the Resize; itself where there is none."""
    size_px, picture = signature.input_ops.size_px, find_picture_input(signature)
    if size_px is None or picture is None or head in _HEADS_WITH_OWN_RESIZE:
        return signature
    sides = (size_px[1], size_px[0])
    dims = (3, *sides) if picture.layout == "NCHW" else (*sides, 3)
    inputs = tuple(
        TensorInfo(t.name, t.dtype, (*(t.shape or ())[:1], *dims)) if t.name == picture.name else t
        for t in signature.inputs
    )
    return replace(signature, inputs=inputs)


def scale_boxes_back(signature: ModelSignature, interpretation: ModelInterpretation) -> ModelInterpretation:
    """A reading of the network behind the Resize as one of the whole; unchanged where there is none.

    Raises:
        ModelError: its last nodes multiply by such a ratio, so the boxes may have been scaled back already.
    """
    picture = find_picture_input(signature)
    inner = interpretation.input
    if picture is None or (picture.width_px, picture.height_px) == (inner.width_px, inner.height_px):
        return interpretation
    factors = (picture.width_px / inner.width_px, picture.height_px / inner.height_px)
    ratios = [ratio for factor in factors for ratio in (factor, 1 / factor) if ratio != 1]
    seen = {factor for output_ops in signature.output_ops.values() for factor in output_ops.factors}
    shaped = any("Shape" in output_ops.operators for output_ops in signature.output_ops.values())
    if shaped or any(abs(a - b) <= _RATIO_TOLERANCE * b for a in seen for b in ratios):
        raise ModelError(
            f"its first nodes resize the picture from {picture.width_px} x {picture.height_px} to"
            f" {inner.width_px} x {inner.height_px}, and its last ones may scale the boxes back or may not;"
            f" export it without the Resize, for pictures of {inner.width_px} x {inner.height_px}",
            state=(),
        )
    clause = f"its graph resizes the picture to {inner.width_px} x {inner.height_px}; boxes are scaled back"
    return replace(
        interpretation,
        input=replace(inner, width_px=picture.width_px, height_px=picture.height_px),
        decoder=ResizedDecoder(interpretation.decoder, factors),
        evidence=(*interpretation.evidence, clause),
    )
